"""Options of ps-export: ``ExportConfig``, each option declared once."""

from dataclasses import dataclass

from torch_ps.common.options.fields import at_least, check_all, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    version: int = option(0, "the checkpoint's version; 0 is the newest", check=at_least(0), common=True)

    def __post_init__(self) -> None:
        check_all(self)
