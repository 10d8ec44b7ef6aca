"""Options of ps-run that neither ps-serve nor ps-worker has: ``RunConfig``, each option declared once."""

from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import Check, at_least, check_all, option
from torch_ps.common.options.slow_workers import parse_slow

#: Number of workers that ``-n auto`` means on a host without a GPU.
WITHOUT_GPU = 2
#: How often Ray restarts one process.
RESTARTS = 3


def _is_count(text: str) -> bool:
    return text == "auto" or (text.isdecimal() and int(text) >= 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Options of ps-run that neither ps-serve nor ps-worker has."""

    workers: str = option(
        "auto",
        f"number of workers; auto is one per GPU, or {WITHOUT_GPU} where there is none",
        metavar="N|auto",
        short="-n",
        check=Check("a whole number >= 1, or auto", _is_count),
        common=True,
    )
    slow: tuple[str, ...] = option(
        (),
        "slow a worker down: each of its steps takes FACTOR times as long, such as w1:3x",
        metavar="WORKER:FACTOR",
        common=True,
    )
    events: str = option("", "write what each worker does to a file of JSON lines in this folder", metavar="DIR")
    on: str = option(
        "here",
        "where the processes run: on this host, or on an existing Ray cluster",
        choices=("here", "ray"),
        common=True,
    )
    ray_address: str = option(
        "",
        "with --on ray: address of the cluster; empty means $RAY_ADDRESS, or a cluster on this host",
        metavar="HOST:PORT",
    )
    restarts: int | None = option(
        None, f"with --on ray: how often one process is restarted; {RESTARTS} if not given", check=at_least(0)
    )

    def __post_init__(self) -> None:
        check_all(self)
        parse_slow(self.slow)
        for name, idle in (("ray_address", ""), ("restarts", None)):
            if self.on != "ray" and (value := getattr(self, name)) != idle:
                raise ConfigError(f"{name}={value} has no effect without on=ray; give --on ray too")
