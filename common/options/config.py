"""Options of servers and workers, each declared once.

Rules of this file
  1. A field declared here is a flag, an environment variable and a TOML key, see ``command_line.py``.
  2. ``__post_init__`` checks each value, then combinations of values. A config object that exists is valid.
  3. Code below the command line gets one of these objects and reads neither argv nor the environment.

Options of one command only (ps-run, ps-compare, ps-status) are declared in the same way in its module.

Source: Li et al., OSDI 2014, for servers and workers; torchrun for RANK.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch_ps.common import codecs as table
from torch_ps.common.errors import ConfigError
from torch_ps.common.options import security_options as protection
from torch_ps.common.options import trace_options
from torch_ps.common.options.fields import Check, at_least, check_all, more_than, option, within
from torch_ps.common.options.forms import parse_compensation, parse_etcd, parse_shard
from torch_ps.common.options.mode_choices import DEFAULT_SLACK, MODES, STALENESS_LR
from torch_ps.common.wire import address

PLANES = ("auto", "memory", "network")
PRECISIONS = ("fp32", "bf16", "fp16")

#: Seconds between two checkpoints if no option says otherwise.
DEFAULT_CHECKPOINT_SECONDS = 600.0
#: Default limit of the buckets that a server steps in parallel; with more of them, memory bandwidth is the limit.
MOST_APPLY_THREADS = 4
#: Defaults of the outer optimizer of ``local_steps``: those of DiLoCo, arXiv:2311.08105, section 3.2.
DEFAULT_OUTER_LR, DEFAULT_OUTER_MOMENTUM = 0.7, 0.9
LEVELS = ("debug", "info", "warning", "error")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?", re.ASCII)


def check_codecs(compress: str, compress_pull: str) -> None:
    """Refuse names of codecs that do not exist; call it when codecs of users are imported.

    Raises:
        ConfigError: a codec does not exist; lists those that do.
    """
    for option_, name in (("compress", compress), ("compress_pull", compress_pull)):
        try:
            table.check_name(name)
        except ConfigError as error:
            raise ConfigError(f"{option_}: {error}") from None


def _address(*, free_port: bool, word: str = "") -> Check:
    """Check of an address; ``word`` is a text that is allowed instead of one, such as "off"."""
    return Check("", lambda text: text == word or bool(address.parse(text, free_port=free_port)))


def _codec(help: str) -> Any:
    """Option for a codec. Only its argument is checked here: the name may be one that ``--codecs`` registers later."""

    def has_good_argument(name: str) -> bool:
        table.check_argument(name)
        return True

    check = Check("", has_good_argument)
    return option("none", help, metavar="CODEC", check=check, common=True)


def _codecs() -> Any:
    return option("", "modules to import that register your own codecs", metavar="MODULE[,...]")


def _log_level() -> Any:
    return option("info", "least level of the log lines on stderr", choices=LEVELS, metavar="LEVEL")


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
        "most memory for parameters and optimizer state of this shard; 0 is the machine's",
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
        check=Check("cpu, cuda or cuda:N", lambda text: bool(_DEVICE.fullmatch(text))),
    )
    apply_threads: int | None = option(
        None,
        f"buckets that a server steps in parallel; one per CPU, at most {MOST_APPLY_THREADS}, if not given",
        check=at_least(1),
    )
    codecs: str = _codecs()
    trace: str = trace_options.trace()
    trace_steps: str = trace_options.trace_steps()
    ready_file: str = option("", "file to write when all shards accept work, in JSON", metavar="FILE", per_process=True)
    log_level: str = _log_level()

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
        listen = address.parse(self.listen, free_port=True)
        if listen.port + self.shards - 1 > 65535:
            raise ConfigError(f"{self.shards} shards from port {listen.port} on would end above port 65535")
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
                    raise ConfigError(f"{name} needs checkpoint, the folder or URL to write to")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Options of one worker process."""

    servers: str = option(
        "",
        "addresses of all shards, shard 0 first; a standby follows its primary after a |",
        metavar="HOST:PORT[|HOST:PORT],...",
        check=Check("", lambda text: not text or bool(address.parse_servers(text))),
        common=True,
        per_process=True,
    )
    name: str = option(
        "",
        "unique name of this worker; if empty, w and its rank, or a random one without rank",
        check=Check(
            "letters, digits, '.', '_' or '-', at most 64", lambda text: not text or bool(_NAME.fullmatch(text))
        ),
        metavar="NAME",
        per_process=True,
    )
    rank: int | None = option(
        None,
        "rank of this worker; by the order of names if not given",
        env="RANK",
        check=at_least(0),
        per_process=True,
    )
    world: int = option(
        0,
        "number of workers that are started together; 0 if unknown",
        env="WORLD_SIZE",
        check=at_least(0),
        per_process=True,
    )
    device: str = option(
        "auto",
        "auto, cpu, cuda or cuda:N; auto is the GPU of the local rank, or the CPU",
        metavar="DEVICE",
        check=Check("auto, cpu, cuda or cuda:N", lambda text: text == "auto" or bool(_DEVICE.fullmatch(text))),
        common=True,
    )
    task: str = option("", "what to train: gpt, digits or module:function", metavar="TASK", common=True)
    data: str = option("", "file or folder that the task reads; its own data if empty", metavar="PATH", common=True)
    samples: int = option(20000, "samples that the whole job trains on", check=at_least(1), common=True)
    batch_size: int | Literal["auto"] = option(
        0,
        "samples a step of one worker; auto finds what the device does best, 0 is the task's own",
        check=at_least(0),
        common=True,
    )
    lr: float = option(0.0, "learning rate; 0 is the task's own", check=at_least(0), common=True)
    compress: str = _codec(f"codec of gradients: {', '.join(table.forms())}")
    compress_pull: str = _codec("codec of parameters: one of the same")
    precision: str = option("fp32", "number format that a task computes in", choices=PRECISIONS, common=True)
    feedback: str = option(
        "auto",
        "add what a codec left out to the next push; auto: if the codec is biased",
        choices=("auto", "on", "off"),
    )
    compress_warmup: int = option(
        0, "first steps, in which topk and randk send more, from 25 % on down", metavar="STEPS", check=at_least(0)
    )
    momentum_correction: str = option(
        "auto", "with topk and randk, apply SGD's momentum on the worker, not on the server", choices=("auto", "off")
    )
    seed: int = option(0, "seed of the model and of the order of the data", check=at_least(0))
    accumulate: int = option(1, "backward passes per push", check=at_least(1))
    local_steps: int = option(
        1,
        "optimizer steps of a worker between two pushes (DiLoCo)",
        check=at_least(1),
    )
    outer_lr: float | None = option(
        None,
        f"local steps: learning rate of the servers' SGD; {DEFAULT_OUTER_LR} if not given",
        check=more_than(0),
    )
    outer_momentum: float | None = option(
        None,
        f"local steps: its Nesterov momentum; {DEFAULT_OUTER_MOMENTUM} if not given",
        check=Check(">= 0 and < 1", lambda momentum: 0 <= momentum < 1),
    )
    overlap: str = option(
        "auto",
        "send gradients while backward runs; forward: also receive parameters while the next forward runs",
        choices=("auto", "on", "off", "forward"),
    )
    plane: str = option("auto", "what carries buckets; auto is memory between processes of one host", choices=PLANES)
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()
    timeout: float = option(300.0, "longest wait for the other workers", unit="seconds", check=more_than(0))
    slow: float = option(1.0, "take that many times as long for each step", metavar="FACTOR", check=at_least(1))
    evaluations: int = option(20, "points at which rank 0 measures the model", check=at_least(0))
    events: str = option("", "file for events, in JSON lines", metavar="FILE")
    tensorboard: str = option("", "folder for TensorBoard's event files, of every worker", metavar="DIR")
    threads: int = option(1, "CPU threads that a worker computes with", check=at_least(1))
    codecs: str = _codecs()
    log_level: str = _log_level()

    def __post_init__(self) -> None:
        check_all(self)
        table.load(self.codecs)
        check_codecs(self.compress, self.compress_pull)
        if self.compress_warmup and self.compress.partition(":")[0] not in ("topk", "randk"):
            raise ConfigError(f"compress_warmup is for topk and randk; compress is {self.compress!r}")
        self._check_local_steps()
        if self.overlap == "forward" and self.task:
            raise ConfigError(
                f"overlap=forward is for training loops of one's own; that of task={self.task} reads each result "
                "at once, so nothing would overlap; give overlap=auto or on, or run a script"
            )

    def _check_local_steps(self) -> None:
        """Refuse options of local steps without them, and options that have no effect with them."""
        if self.local_steps == 1:
            for name in ("outer_lr", "outer_momentum"):
                if (value := getattr(self, name)) is not None:
                    raise ConfigError(
                        f"{name}={value:g} is for local steps and local_steps is 1; give local_steps of 2 or more, or "
                        f"no {name}"
                    )
        elif self.overlap in ("on", "forward"):
            raise ConfigError(
                f"overlap={self.overlap} sends gradients during backward, but with local_steps={self.local_steps} a "
                "push exists only after the last of these steps; give overlap=auto or off"
            )
