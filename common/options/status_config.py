"""Options of ps-status: ``StatusConfig``, each option declared once."""

from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.common.options import security_options as protection
from torch_ps.common.options.fields import Check, at_least, check_all, more_than, option
from torch_ps.common.wire import job_servers


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    servers: str = option(
        "",
        "addresses of all shards of the job, shard 0 first; of several models NAME=HOST:PORT,...;NAME=...",
        metavar="HOST:PORT,...",
        check=Check("", lambda text: not text or bool(job_servers.parse_jobs(text))),
        common=True,
    )
    job: str = option("", "of several models, the one to show; all if empty", metavar="NAME", common=True)
    watch: bool = option(False, "poll until the job ends or Ctrl-C, and show rates", common=True)
    json: bool = option(False, "print one JSON object per poll and job instead of tables", common=True)
    interval: float = option(1.0, "with --watch: time between two polls", unit="seconds", check=more_than(0))
    watch_seconds: float = option(
        0.0, "with --watch: stop after this time; 0 means never", unit="seconds", check=at_least(0)
    )
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()
    timeout: float = option(
        5.0, "longest wait for the answer of one server", unit="seconds", check=Check("> 0", lambda s: s > 0)
    )

    def __post_init__(self) -> None:
        check_all(self)
        if self.watch_seconds and not self.watch:
            raise ConfigError(f"watch_seconds={self.watch_seconds:g} has no effect without watch; give --watch too")
