"""Options of ps-compare, ``CompareConfig``: those that all runs share, and ``--runs`` for those that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch_ps.common.options import security_options as protection
from torch_ps.common.options import trace_options
from torch_ps.common.options.fields import Check, at_least, check_all, declared, option, within
from torch_ps.common.options.slow_workers import slow_of
from torch_ps.common.options.worker_config import WorkerConfig

DEFAULT_RUNS = "sync,sync:compress=fp16,async,async:compress=fp16"


def _as_for_workers(name: str) -> tuple[Check, ...]:
    return declared(WorkerConfig)[name].checks


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Options of one comparison."""

    runs: str = option(
        DEFAULT_RUNS,
        "sync, async, ssp or local:STEPS, then options of ps-run: sync,async:codec=fp16,local:8",
        metavar="RUN[,...]",
        common=True,
    )
    task: str = option("gpt", "what to train: gpt, digits or module:function", metavar="TASK", common=True)
    data: str = option("", "file or folder that the task reads; its own data if empty", metavar="PATH", common=True)
    workers: int = option(2, "workers of each run", short="-n", check=at_least(1), common=True)
    samples: int = option(
        0, "samples that each run trains on; 0 is a few minutes' worth", check=at_least(0), common=True
    )
    batch_size: int | Literal["auto"] = option(
        0,
        "samples per step of one worker; auto is found once, for all runs; 0 is the task's own",
        check=at_least(0),
        common=True,
    )
    lr: float = option(0.0, "base learning rate; 0 is the task's own", check=at_least(0), common=True)
    scale_lr: str = option(
        "on",
        "multiply the base rate of sync runs by the number of workers",
        choices=("on", "off"),
        common=True,
    )
    slow: tuple[str, ...] = option(
        (), "make a worker slower in every run, such as w1:3x", metavar="WORKER:FACTOR", common=True
    )
    seed: int = option(0, "seed of the model and of the order of the data", check=at_least(0), common=True)
    seeds: int = option(
        1,
        "runs of each configuration, with that seed and the next ones",
        check=within(1, 100),
        common=True,
    )
    device: str = option(
        "auto",
        "auto, cpu, cuda or cuda:N; auto is one GPU per worker, or else the CPU",
        check=_as_for_workers("device"),
        common=True,
    )
    target: float | None = option(
        None,
        "validation loss to measure the time to; if not given, one that every run reaches",
        metavar="LOSS",
        common=True,
    )
    out: str = option("", "folder for report, results and logs; runs/DATE-TIME if empty", metavar="DIR", common=True)
    shards: int = option(1, "server processes of each run", check=at_least(1))
    evaluations: int = option(20, "number of evaluations on validation data", check=at_least(2))
    threads: int = option(1, "CPU threads that each process computes with", check=at_least(1))
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    tensorboard: str = option("", "folder for TensorBoard's event files of each run", metavar="DIR")
    trace_steps: str = trace_options.trace_steps("", "write a timeline of these steps of each run, DIR/RUN/trace.json")
    report: str = option("", "train nothing: write the report of an earlier results.json again", metavar="FILE")

    def __post_init__(self) -> None:
        check_all(self)
        slow_of(self.slow, self.workers)

    @property
    def scaled(self) -> bool:
        return self.scale_lr == "on"
