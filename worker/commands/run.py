"""ps-run: a whole job, servers and workers as child processes on this host, or as tasks of a Ray cluster.

    ps-serve  starts --> ready file --> workers start --> workers end --> ps-serve stops
                                            | one fails, Ctrl-C, SIGTERM, SIGHUP
                                            v
                                     everything stops

Rules of this file
  1. The job ends well if every worker does; else with the exit code of the first that did not, and its name is said.
  2. Children get what they have to know by environment, so that nothing they inherit can disagree with it.
"""

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from torch_ps.common import log as logs
from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.config import ServerConfig, WorkerConfig
from torch_ps.common.options.fields import Check, at_least, check_all, environment_of, option, per_process
from torch_ps.common.options.slow_workers import parse_slow, slow_of
from torch_ps.worker.commands import worker as cli
from torch_ps.worker.commands.processes import GRACE, Child, Processes

log = logging.getLogger("torch_ps.run")

#: Workers of ``-n auto`` where there is no GPU.
WITHOUT_GPU = 2
#: Times that Ray starts one process again.
RESTARTS = 3
#: Seconds in which the servers have to accept work.
START_SECONDS = 90.0
#: Seconds in which servers have to end that write a last checkpoint.
CHECKPOINT_SECONDS = 90.0
#: Seconds between two looks at the children when they are silent.
LOOK_EVERY = 0.1

_NAMES_ERROR = re.compile(r"(?<!\w)\w*[Ee]rror: ")


def _is_count(text: str) -> bool:
    return text == "auto" or (text.isdecimal() and int(text) >= 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What only a whole job has."""

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
        "a worker that takes that many times as long for each step, such as w1:3x",
        metavar="WORKER:FACTOR",
        common=True,
    )
    events: str = option("", "folder for what the workers do, in JSON lines, one file each", metavar="DIR")
    on: str = option("here", "where: this host, or an existing Ray cluster", choices=("here", "ray"), common=True)
    ray_address: str = option(
        "", "on ray: address of the cluster; $RAY_ADDRESS, or that of this host, if empty", metavar="HOST:PORT"
    )
    restarts: int | None = option(
        None, f"on ray: times that one process is started again; {RESTARTS} if not given", check=at_least(0)
    )

    def __post_init__(self) -> None:
        check_all(self)
        parse_slow(self.slow)
        for name, idle in (("ray_address", ""), ("restarts", None)):
            if self.on != "ray" and (value := getattr(self, name)) != idle:
                raise ConfigError(f"{name}={value} is for a job on ray; give on=ray too")


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@options_of(RunConfig)
@options_of(ServerConfig, exclude=(*per_process(ServerConfig), "workers", "device"))
@options_of(WorkerConfig, exclude=(*per_process(WorkerConfig), "slow", "events"))
@click.argument("script", nargs=-1, type=click.UNPROCESSED, metavar="[SCRIPT [ARGS]...]")
def main(run: RunConfig, server: ServerConfig, worker: WorkerConfig, script: tuple[str, ...]) -> None:
    r"""Run a whole job: servers, and workers with a task or a script of your own.

    \b
    ps-run -n 2 --task digits --mode async
    ps-run -n 2 --compress fp16 train.py --epochs 3
    """
    cli.check(worker, script)
    logs.setup("ps-run", level=worker.log_level)
    if run.on == "ray":
        sys.exit(run_on_ray(run, server, worker, script))
    sys.exit(run_job(Job(run, server, worker, script, count_of(run.workers))))


def count_of(workers: str) -> int:
    """Number of workers that ``--workers`` means here."""
    if workers != "auto":
        return int(workers)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    log.info(
        "-n auto: %s", f"{count} GPUs, one worker each" if count else f"no GPU, so {WITHOUT_GPU} workers on the CPU"
    )
    return count or WITHOUT_GPU


class Job:
    """What is to be run. ``count`` workers are called w0, w1, ...

    Raises:
        ConfigError: an option names a worker that the job does not have.
    """

    def __init__(
        self, run: RunConfig, server: ServerConfig, worker: WorkerConfig, script: tuple[str, ...], count: int
    ) -> None:
        self._run, self._server, self._worker, self._script, self.count = run, server, worker, script, count
        self._slow = slow_of(run.slow, count)

    def server_command(self) -> list[str]:
        return [sys.executable, "-m", "torch_ps.ps.server.cli"]

    def server_environment(self, ready_file: Path, base: Mapping[str, str]) -> dict[str, str]:
        config = dataclasses.replace(self._server, listen="127.0.0.1:0", workers=self.count, ready_file=str(ready_file))
        return environment_of(config, base)

    def shard_environment(self, shard: int, servers: Sequence[str]) -> dict[str, str]:
        """Variables of one shard of several at known addresses; with checkpoints it goes on from the newest."""
        config = dataclasses.replace(
            self._server,
            listen=servers[shard],
            shards=1,
            shard=f"{shard}/{len(servers)}",
            lead=servers[0] if shard else "",
            workers=self.count,
            insecure=True,  # shard to lead; a token is asked for
            resume=bool(self._server.checkpoint),
            restart_together=bool(self._server.checkpoint),
        )
        return environment_of(config, {})

    @property
    def server_grace(self) -> float:
        """Seconds that the servers get to end: more where they write a last checkpoint."""
        return CHECKPOINT_SECONDS if self._server.checkpoint else GRACE

    def worker_command(self) -> list[str]:
        return [sys.executable, "-m", "torch_ps.worker.commands.worker", *self._script]

    def worker_environment(self, rank: int, servers: str, base: Mapping[str, str]) -> dict[str, str]:
        name = f"w{rank}"
        events = str(Path(self._run.events, f"{name}.jsonl")) if self._run.events else ""
        config = dataclasses.replace(
            self._worker,
            servers=servers,
            name=name,
            rank=rank,
            world=self.count,
            slow=self._slow.get(rank, 1.0),
            events=events,
        )
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.count)}
        return environment_of(config, base) | place


class JobFailed(PsError):
    """A child ended that should not have; ``exit_code`` is the job's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code or 1


def run_on_ray(run: RunConfig, server: ServerConfig, worker: WorkerConfig, script: tuple[str, ...]) -> int:
    """Run a job on a Ray cluster to its end. Returns the exit code: 0, 1 where it failed, or 128 + signal."""
    from torch_ps.worker.commands.ray_launcher import Cluster, Secret, until_ready

    with Secret(server) as secret, Cluster(run.ray_address, RESTARTS if run.restarts is None else run.restarts) as ray:
        signals = _noted()  # Ray has set handlers of its own
        count = int(run.workers) if run.workers != "auto" else ray.gpus or WITHOUT_GPU
        job = Job(run, server, dataclasses.replace(worker, insecure=not worker.tls_ca), script, count)
        try:
            ray.room(server.shards, count, worker.threads)
            servers = ray.addresses(server.shards)
            for shard in range(server.shards):
                told = job.shard_environment(shard, servers)
                ray.start(f"ps{shard}", job.server_command()[1:], told, secret.token)
            until_ready(servers, secret.access, signals, ray)
            log.info("servers %s", ",".join(servers))
            left = set()
            for rank in range(count if not signals else 0):
                told = job.worker_environment(rank, ",".join(servers), {}) | {"LOCAL_RANK": "0"}  # it sees its own GPU
                ray.start(f"w{rank}", job.worker_command()[1:], told, secret.token)
                left.add(f"w{rank}")
            while left and not signals:
                for name, why in ray.ended():
                    if why or name not in left:
                        raise JobFailed(f"the job ends because {why or f'{name} has ended'}", 1)
                    left.discard(name)
        except PsError as error:
            log.error("%s", error)
            return 1
        if signals:
            log.info("%s: stopping servers and workers", signal.Signals(signals[0]).name)
    return 128 + signals[0] if signals else 0


def _noted() -> list[int]:
    """A list that signals to end are added to from now on."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    return signals


def run_job(job: Job) -> int:
    """Run ``job`` to its end. Returns the exit code: 0, that of the first child that failed, or 128 + signal."""
    signals = _noted()
    with tempfile.TemporaryDirectory(prefix="ps-run-") as folder, Processes() as children:
        try:
            server = children.start(
                "ps", job.server_command(), job.server_environment(Path(folder, "ready"), os.environ)
            )
            servers = _ready(Path(folder, "ready"), children, server, signals)
            workers: list[Child] = []
            for rank in range(job.count if not signals else 0):
                environment = job.worker_environment(rank, servers, os.environ)
                workers.append(children.start(f"w{rank}", job.worker_command(), environment))
            _attend(children, server, workers, signals)
        except JobFailed as error:
            log.error("%s", error)
            return error.exit_code
        except BrokenPipeError:  # whoever read our output has gone
            return 128 + signal.SIGPIPE
        finally:
            # Workers first: a server that goes before them would give them an error to report.
            children.stop([child for child in children.running if child is not server])
            children.stop(children.running, job.server_grace)
    return 128 + signals[0] if signals else 0


def _ready(file: Path, children: Processes, server: Child, signals: list[int]) -> str:
    """Wait until the servers accept work. Returns their addresses, "" if a signal came first."""
    deadline = time.monotonic() + START_SECONDS
    while not file.exists():
        if signals:
            return ""
        if server in children.look(LOOK_EVERY):
            raise JobFailed(f"no job: {_why(server)}", server.exit_code or 1)
        if time.monotonic() > deadline:
            raise JobFailed(f"no job: the servers do not accept work after {START_SECONDS:g} s", 1)
    told = json.loads(file.read_text(encoding="utf-8"))
    log.info(
        "servers %s%s", ",".join(told["servers"]), "".join(f", metrics http://{m}/metrics" for m in told["metrics"])
    )
    return ",".join(told["servers"])


def _attend(children: Processes, server: Child, workers: list[Child], signals: list[int]) -> None:
    """Wait until all workers have ended well, or a signal has come.

    Raises:
        JobFailed: a worker failed, or the servers ended before the workers.
    """
    left = set(workers)
    while left and not signals:
        for child in children.look(LOOK_EVERY):
            if child is server:
                raise JobFailed(f"the job has lost its servers: {_why(child)}", child.exit_code or 1)
            if child.exit_code:
                raise JobFailed(f"the job ends because {_why(child)}", child.exit_code)
            left.discard(child)
    if signals:
        log.info("%s: stopping servers and workers", signal.Signals(signals[0]).name)


def _why(child: Child) -> str:
    """How it ended, and the line that says why: our own sentence, else the last that names an error, else the last."""
    lines = [line.strip() for line in child.last_lines if line.strip()]
    own = [line for line in lines if line.startswith("Error: ")]
    named = [line for line in lines if _NAMES_ERROR.search(line)]
    return f"{child.end}: {(own or named or lines)[-1]}" if lines else child.end


if __name__ == "__main__":
    main()
