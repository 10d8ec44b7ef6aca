"""Options of ps-serve: ``ServerConfig``, each option declared once.

Rules of this file
  1. A field declared here is a flag, an environment variable and a TOML key, see ``command_line.py``.
  2. ``__post_init__`` checks each value, then combinations of values. A config object that exists is valid.
  3. Code below the command line gets one of these objects and reads neither argv nor the environment.

Source: Li et al., OSDI 2014.
"""

from dataclasses import dataclass

from torch_ps.common import codecs as table
from torch_ps.common.errors import ConfigError
from torch_ps.common.options import security_options as protection
from torch_ps.common.options import trace_options
from torch_ps.common.options.fields import Check, at_least, check_all, more_than, option, within
from torch_ps.common.options.mode_choices import DEFAULT_SLACK, MODES, STALENESS_LR
from torch_ps.common.options.parsers import parse_compensation, parse_etcd, parse_shard
from torch_ps.common.options.shared_options import DEVICE, codec_modules, log_level
from torch_ps.common.wire import address, job_servers

#: Seconds between two checkpoints if no option says otherwise.
DEFAULT_CHECKPOINT_SECONDS = 600.0
#: Default limit of the buckets that a server steps in parallel; with more of them, memory bandwidth is the limit.
MOST_APPLY_THREADS = 4
#: Models that one command starts servers for, at most.
MOST_MODELS = 64


def names_of_models(text: str) -> tuple[str, ...]:
    """Read ``--models``: a number, or names with commas between them; "" is one model without a name.

    Raises:
        ConfigError: a name is malformed or repeated, or the number is below 1 or above 64.
    """
    text = text.strip()
    if text.isdecimal():
        if not 1 <= int(text) <= MOST_MODELS:
            raise ConfigError(f"the number of models must be between 1 and {MOST_MODELS}; got {text}")
        return tuple(map(job_servers.default_name, range(int(text))))
    names = tuple(job_servers.check_name(name.strip()) for name in text.split(",")) if text else ("",)
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(f"each model must have a name of its own; {name} stands twice in {text!r}")
    return names


def _address(*, free_port: bool, word: str = "") -> Check:
    """Check of an address; ``word`` is a text that is allowed instead of one, such as "off"."""
    return Check("", lambda text: text == word or bool(address.parse(text, free_port=free_port)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of one server process: one shard of a job, or with ``shards`` the parent of several."""

    listen: str = option(
        "127.0.0.1:50051",
        "address to bind; port 0 picks a free one",
        metavar="HOST:PORT",
        check=_address(free_port=True),
        common=True,
        per_process=True,
    )
    workers: int = option(
        1, "workers that the first synchronous step waits for", check=at_least(1), common=True, job_wide=True
    )
    mode: str = option(
        "sync",
        "when a gradient is applied: with all others, at once, or at once but no worker far ahead",
        choices=MODES,
        common=True,
        job_wide=True,
    )
    shards: int = option(1, "server processes to start here, on consecutive ports", check=within(1, 1024), common=True)
    models: str = option(
        "",
        "number or names of models, as of a GAN; each gets servers",
        metavar="N|NAME,...",
        check=Check("", lambda text: bool(names_of_models(text))),
        common=True,
    )
    job: str = option(
        "",
        "name of this job in log lines; --models gives each model's servers its name",
        metavar="NAME",
        check=Check("", lambda text: not text or bool(job_servers.check_name(text))),
        per_process=True,
    )
    shard: str = option(
        "",
        "this process is shard I of N, the others run elsewhere",
        metavar="I/N",
        check=Check("", lambda text: bool(parse_shard(text))),
        common=True,
        per_process=True,
    )
    lead: str = option(
        "",
        "address of shard 0; needed by the others",
        metavar="HOST:PORT",
        check=_address(free_port=False),
        common=True,
        per_process=True,
    )
    standby_of: str = option(
        "",
        "run as standby of the server there: replicate its state, and take over if it dies",
        metavar="HOST:PORT",
        check=_address(free_port=False),
        common=True,
        per_process=True,
    )
    etcd: str = option(
        "",
        "etcd that decides which server serves, instead of the workers: http(s)://[USER:PASSWORD@]HOST:PORT[/JOB]",
        metavar="URL[,URL...]",
        check=Check("", lambda text: not text or bool(parse_etcd(text))),
    )
    data_port: str = option(
        "0",
        "port for the streams of workers, beside that of listen, whose host it shares; 0 is any free one; off: gRPC "
        "carries them",
        metavar="PORT|off",
        check=Check("0 to 65535, or off", lambda text: text == "off" or (text.isdecimal() and int(text) <= 65535)),
        per_process=True,
    )
    metrics: str = option(
        "127.0.0.1:0",
        "address of the Prometheus page /metrics, or off",
        metavar="HOST:PORT",
        check=_address(free_port=True, word="off"),
        common=True,
    )
    insecure: bool = option(
        False, "allow addresses that other machines can reach, without TLS or token", common=True, per_process=True
    )
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    max_workers: int = option(256, "most workers at a time", check=within(1, 100_000), job_wide=True)
    max_model: float = option(
        0.0,
        "most memory for parameters and optimizer state of this shard; 0 is the machine's or the container's",
        unit="GiB",
        metavar="GIB",
        check=at_least(0),
    )
    checkpoint: str = option(
        "",
        "folder or URL (s3://...) for checkpoints, the same for all shards",
        metavar="DIR",
        common=True,
        job_wide=True,
    )
    resume: bool = option(False, "continue from the newest checkpoint, if there is one", common=True)
    resume_previous: bool = option(False, "like --resume, but from the previous checkpoint if the newest is damaged")
    restart_together: bool = option(
        False, "end when another shard has restarted, so that whatever starts them restarts all"
    )
    checkpoint_every: int = option(0, "steps between two checkpoints", unit="steps", check=at_least(0), job_wide=True)
    checkpoint_seconds: float = option(
        0.0,
        f"seconds between two checkpoints; {DEFAULT_CHECKPOINT_SECONDS:g} if neither is given",
        unit="seconds",
        check=at_least(0),
        job_wide=True,
    )
    keep: int = option(3, "checkpoints to keep", check=at_least(1), job_wide=True)
    clip_norm: float = option(
        0.0, "largest norm of an averaged gradient; 0 clips none", check=at_least(0), job_wide=True
    )
    lease: float = option(
        15.0, "silence after which a worker is dropped", unit="seconds", check=more_than(0), job_wide=True
    )
    bucket_size: float = option(
        4.0,
        "most fp32 parameters in one message",
        unit="MiB",
        metavar="MIB",
        check=Check("> 0 and <= 4", lambda size: 0 < size <= 4),
        job_wide=True,
    )
    slack: int | None = option(
        None,
        f"ssp: steps that a worker may lead the slowest by; {DEFAULT_SLACK} if not given",
        check=at_least(0),
        job_wide=True,
    )
    backup_workers: int = option(
        0, "sync: slowest workers that a step does not wait for", check=at_least(0), job_wide=True
    )
    max_staleness: int | None = option(
        None,
        "async, ssp: drop gradients that are more versions old than this",
        metavar="VERSIONS",
        check=at_least(0),
        job_wide=True,
    )
    staleness_lr: str = option(
        "constant",
        "async, ssp: learning rate as it is, or divided by 1 + staleness",
        choices=STALENESS_LR,
        job_wide=True,
    )
    delay_compensation: str = option(
        "off",
        "async, ssp: correct stale gradients (DC-ASGD): off, constant or adaptive, with a strength as in adaptive:2",
        metavar="FORM[:LAMBDA]",
        check=Check("", lambda text: bool(parse_compensation(text))),
        job_wide=True,
    )
    device: str = option(
        "cpu",
        "device of parameters and optimizer: cpu, cuda or cuda:N; cuda is the GPU of the shard's number",
        metavar="DEVICE",
        check=Check("cpu, cuda or cuda:N", lambda text: bool(DEVICE.fullmatch(text))),
    )
    apply_threads: int | None = option(
        None,
        f"buckets that a server steps in parallel; one per CPU, at most {MOST_APPLY_THREADS}, if not given",
        check=at_least(1),
    )
    codecs: str = codec_modules()
    trace: str = trace_options.trace()
    trace_steps: str = trace_options.trace_steps()
    ready_file: str = option("", "file to write when all shards accept work, in JSON", metavar="FILE", per_process=True)
    log_level: str = log_level()

    def __post_init__(self) -> None:
        check_all(self)
        table.load(self.codecs)
        index, _ = parse_shard(self.shard)
        if self.shard and self.shards > 1:
            raise ConfigError(f"shards={self.shards} starts them all here, shard={self.shard} one of them; give one")
        if index > 0 and not self.lead:
            raise ConfigError(f"shard {self.shard} needs lead, the address of shard 0")
        if index == 0 and self.lead:
            raise ConfigError(f"lead {self.lead} is for shards other than 0; give shard I/N with I > 0, or no lead")
        trace_options.check(self.trace, self.trace_steps, shard=index, standby_of=self.standby_of)
        self._check_mode()
        self._check_checkpoint()
        if self.standby_of and (self.shards > 1 or self.resume or self.resume_previous):
            raise ConfigError(
                f"standby_of={self.standby_of} is for one server, which takes its state from its primary; start one "
                "for each shard, without shards and resume"
            )
        models = self._check_models()
        listen = address.parse(self.listen, free_port=True)
        data = 0 if self.data_port == "off" else int(self.data_port)
        if max(listen.port, data) + models * self.shards - 1 > 65535:
            of, first = f" of each of {models} models" if models > 1 else "", max(listen.port, data)
            raise ConfigError(f"{self.shards} shards{of} from port {first} on would end above port 65535")
        if self.workers > self.max_workers:
            raise ConfigError(f"workers={self.workers} would wait for more than max_workers={self.max_workers} let in")
        protection.check_server(
            listen=self.listen,
            metrics=self.metrics,
            insecure=self.insecure,
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            token_file=self.token_file,
        )

    def _check_models(self) -> int:
        """Number of models; refuses what is for the servers of one model."""
        for name in ("shard", "standby_of", "job"):
            if self.models and (value := getattr(self, name)):
                raise ConfigError(
                    f"models={self.models} starts the servers of all models here and {name}={value} is for those of "
                    f"one; leave models out, and give the servers of each model {name}"
                )
        return len(names_of_models(self.models))

    def _check_checkpoint(self) -> None:
        """Refuse options of checkpoints without a place to write them."""
        if not self.checkpoint:
            for name, idle in (
                ("resume", False),
                ("resume_previous", False),
                ("restart_together", False),
                ("checkpoint_every", 0),
                ("checkpoint_seconds", 0),
            ):
                if getattr(self, name) != idle:
                    raise ConfigError(f"{name} needs checkpoint, the folder or URL of the checkpoints")
        if self.restart_together and not (self.resume or self.resume_previous):
            raise ConfigError("restart_together needs resume: restarted servers continue from a checkpoint")
        if self.checkpoint_every and self.checkpoint_seconds:
            raise ConfigError(
                f"checkpoint_every={self.checkpoint_every} and checkpoint_seconds={self.checkpoint_seconds:g} both say "
                "when a checkpoint is due; give one"
            )

    def _check_mode(self) -> None:
        """Refuse options of one mode in another, where they would have no effect."""
        if self.slack is not None and self.mode != "ssp":
            raise ConfigError(f"slack={self.slack} is for mode ssp; the mode is {self.mode}")
        if self.backup_workers and self.mode != "sync":
            raise ConfigError(f"backup_workers={self.backup_workers} is for mode sync; the mode is {self.mode}")
        if 1 < self.workers <= self.backup_workers:
            raise ConfigError(
                f"backup_workers={self.backup_workers} leaves none of {self.workers} workers to wait for; give fewer"
            )
        if self.mode == "sync":
            for name, idle in (("max_staleness", None), ("staleness_lr", "constant"), ("delay_compensation", "off")):
                if (value := getattr(self, name)) != idle:
                    raise ConfigError(f"{name}={value} is for modes async and ssp; in sync no gradient is stale")
        if self.clip_norm and self.max_staleness is not None:
            # Staleness is judged per bucket; the norm of a push that is refused in part would never be complete.
            raise ConfigError(
                f"clip_norm={self.clip_norm:g} needs whole gradients and max_staleness={self.max_staleness} may drop "
                "a part of one; give one of them"
            )
