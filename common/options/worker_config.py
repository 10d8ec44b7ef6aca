"""Options of a worker: ``WorkerConfig``, each option declared once.

Rules of this file
  1. A field declared here is a flag, an environment variable and a TOML key, see ``command_line.py``.
  2. ``__post_init__`` checks each value, then combinations of values. A config object that exists is valid.
  3. Code below the command line gets one of these objects and reads neither argv nor the environment.

Options of one command only (ps-run, ps-compare, ps-status) are declared in the same way in its module.

Source: torchrun for RANK, https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch_ps.common import codecs as table
from torch_ps.common.errors import ConfigError
from torch_ps.common.options import security_options as protection
from torch_ps.common.options.fields import Check, at_least, check_all, more_than, option, within
from torch_ps.common.options.shared_options import DEVICE, codec_modules, log_level
from torch_ps.common.wire import job_servers
from torch_ps.common.wire.port_proof import MAX_CONNECTIONS

PLANES = ("auto", "memory", "network", "grpc")
OVERLAPS = ("auto", "on", "off", "forward", "eager", "eager,forward")
PRECISIONS = ("fp32", "bf16", "fp16")

#: Defaults of the outer optimizer of ``local_steps``: those of DiLoCo, arXiv:2311.08105, section 3.2.
DEFAULT_OUTER_LR, DEFAULT_OUTER_MOMENTUM = 0.7, 0.9

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


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


def _codec(help: str) -> Any:
    """Option for a codec. Only its argument is checked here: the name may be one that ``--codecs`` registers later."""

    def has_good_argument(name: str) -> bool:
        table.check_argument(name)
        return True

    check = Check("", has_good_argument)
    return option("none", help, metavar="CODEC", check=check, common=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Options of one worker process."""

    servers: str = option(
        "",
        "addresses of all shards, shard 0 first; a standby after a |; several models as NAME=...;NAME=...",
        metavar="HOST:PORT[|HOST:PORT],...",
        check=Check("", lambda text: not text or bool(job_servers.parse_jobs(text))),
        common=True,
        per_process=True,
    )
    job: str = option(
        "",
        "of several jobs that servers lists, the one to take part in; if empty, the first that is free",
        metavar="NAME",
        check=Check("", lambda text: not text or bool(job_servers.check_name(text))),
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
        check=Check("auto, cpu, cuda or cuda:N", lambda text: text == "auto" or bool(DEVICE.fullmatch(text))),
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
        "send gradients while backward runs; eager: apply them then, too, for loops that leave them alone; forward: "
        "receive parameters while the next forward runs",
        choices=OVERLAPS,
    )
    buffers: str = option(
        "sync",
        "sync: running statistics are averaged, other buffers are those of rank 0; local: each worker keeps its own",
        choices=("sync", "local"),
    )
    plane: str = option(
        "auto",
        "what carries buckets; auto is memory between processes of one host, network the servers' data ports or gRPC",
        choices=PLANES,
    )
    connections: int = option(
        1,
        "TCP connections to each data port; more for links with long round trips",
        check=within(1, MAX_CONNECTIONS),
    )
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()
    timeout: float = option(300.0, "longest wait for servers and for other workers", unit="seconds", check=more_than(0))
    slow: float = option(1.0, "take that many times as long for each step", metavar="FACTOR", check=at_least(1))
    evaluations: int = option(20, "points at which rank 0 measures the model", check=at_least(0))
    events: str = option("", "file for events, in JSON lines", metavar="FILE")
    tensorboard: str = option("", "folder for TensorBoard's event files, of every worker", metavar="DIR")
    threads: int = option(1, "CPU threads that a worker computes with", check=at_least(1))
    codecs: str = codec_modules()
    log_level: str = log_level()

    def __post_init__(self) -> None:
        check_all(self)
        table.load(self.codecs)
        check_codecs(self.compress, self.compress_pull)
        if self.compress_warmup and self.compress.partition(":")[0] not in ("topk", "randk"):
            raise ConfigError(f"compress_warmup is for topk and randk; compress is {self.compress!r}")
        self._check_local_steps()
        if "forward" in self.overlap and self.task:
            raise ConfigError(
                f"overlap={self.overlap} is for training loops of one's own; that of task={self.task} reads each "
                "result at once, so nothing would overlap; give overlap=auto or eager, or run a script"
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
        elif self.overlap not in ("auto", "off"):
            raise ConfigError(
                f"overlap={self.overlap} sends gradients during backward, but with local_steps={self.local_steps} a "
                "push exists only after the last of these steps; give overlap=auto or off"
            )
