"""ps-run: starts servers and workers of a job as child processes on this host, or as tasks of a Ray cluster.

    ps-serve  starts --> ready file --> workers start --> workers end --> ps-serve stops
                                            | one fails, or Ctrl-C, SIGTERM, SIGHUP
                                            v
                                     everything stops

Rules of this file
  1. The exit code is 0 if every worker and then the servers end with 0, which they do not if their last checkpoint has
     failed; else it is that of the first child that failed, which is named. Where output was lost it is 1.
  2. Children are configured by environment variables alone, so nothing that they inherit can contradict the options.
"""

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import click

from torch_ps.common import log as logs
from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.fields import environment_of, per_process
from torch_ps.common.options.models import names_of_models, options_of_model
from torch_ps.common.options.output_files import check_folder
from torch_ps.common.options.run_config import RESTARTS, WITHOUT_GPU, RunConfig
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.slow_workers import slow_of
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.common.slow_start import SlowStart
from torch_ps.worker.commands import worker as ps_worker
from torch_ps.worker.commands.processes import GRACE, Child, Processes
from torch_ps.worker.runtime.torchrun_env import free_master, process_group

log = logging.getLogger("torch_ps.run")

#: Seconds between SIGTERM and SIGKILL for servers that write a last checkpoint; anew whenever a part is written.
CHECKPOINT_SECONDS = 90.0
#: Exit code of a process that had to be killed.
KILLED = 128 + signal.SIGKILL
#: Seconds between two polls of children that print nothing.
POLL_EVERY = 0.1

_NAMES_ERROR = re.compile(r"(?<!\w)\w*[Ee]rror: ")


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@options_of(RunConfig)
@options_of(ServerConfig, exclude=(*per_process(ServerConfig), "workers", "device"))
@options_of(WorkerConfig, exclude=(*per_process(WorkerConfig), "slow", "events"))
@click.argument("script", nargs=-1, type=click.UNPROCESSED, metavar="[SCRIPT [ARGS]...]")
def main(run: RunConfig, server: ServerConfig, worker: WorkerConfig, script: tuple[str, ...]) -> None:
    r"""Run a whole job: servers, and workers that run a ready-made task or your script.

    \b
    ps-run -n 2 --task digits --mode async
    ps-run -n 2 --models generator,critic train.py --epochs 3
    """
    ps_worker.check(worker, script)
    if run.events:
        check_folder("events", run.events)
    if server.models and worker.task:
        raise ConfigError(f"models={server.models} is for scripts; task {worker.task!r} trains one model")
    logs.setup("ps-run", level=worker.log_level)
    if run.on == "ray":
        sys.exit(run_on_ray(run, server, worker, script))
    sys.exit(run_job(JobSpec(run, server, worker, script, count_of(run.workers))))


def count_of(workers: str) -> int:
    """Number of workers that the option ``--workers`` means on this host."""
    if workers != "auto":
        return int(workers)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    log.info(
        "-n auto: %s", f"{count} GPUs, one worker each" if count else f"no GPU found, {WITHOUT_GPU} workers on the CPU"
    )
    return count or WITHOUT_GPU


class JobSpec:
    """Command line and environment of every process of a job.

    Args:
        run: options of ps-run alone.
        server: options of all servers.
        worker: options of all workers.
        script: the user's script and its arguments; empty if the workers run a ready-made task.
        count: number of workers; they are called w0, w1, ...

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

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models; one empty name where there is one model."""
        return names_of_models(self._server.models)

    def shard_environment(self, shard: int, servers: Sequence[str], model: int = 0) -> dict[str, str]:
        """Environment of one shard, for servers at known addresses; it resumes from the newest checkpoint, if any.

        Args:
            shard: number of the shard.
            servers: addresses of all shards of the model.
            model: place of the model in ``models``.
        """
        config = dataclasses.replace(
            options_of_model(self._server, model) if self._server.models else self._server,
            listen=servers[shard],
            shards=1,
            shard=f"{shard}/{len(servers)}",
            lead=servers[0] if shard else "",
            workers=self.count,
            insecure=True,  # between shard and lead; the token still authenticates
            resume=bool(self._server.checkpoint),
            restart_together=bool(self._server.checkpoint),
        )
        return environment_of(config, {})

    @property
    def has_checkpoints(self) -> bool:
        return bool(self._server.checkpoint)

    @property
    def server_grace(self) -> float:
        """Seconds between SIGTERM and SIGKILL of the servers: more if they write a last checkpoint."""
        return CHECKPOINT_SECONDS if self._server.checkpoint else GRACE

    def worker_command(self) -> list[str]:
        return [sys.executable, "-m", "torch_ps.worker.commands.worker", *self._script]

    def worker_environment(
        self, rank: int, servers: str, base: Mapping[str, str], master: str, *, one_host: bool = True
    ) -> dict[str, str]:
        """Environment of one worker.

        Args:
            rank: rank of the worker.
            servers: ``$PS_SERVERS``.
            base: environment that the worker inherits.
            master: "HOST:PORT" for the ``torch.distributed`` of a script.
            one_host: whether all workers are on one host.
        """
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
        return environment_of(config, base) | process_group(rank, self.count, master, one_host=one_host)


class JobFailed(PsError):
    """A server ended before the workers, or a worker failed; ``exit_code`` is that of the job."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code or 1


def run_on_ray(run: RunConfig, server: ServerConfig, worker: WorkerConfig, script: tuple[str, ...]) -> int:
    """Run a job on a Ray cluster to its end. Returns the exit code: 0, 1 where it failed, or 128 + signal."""
    from torch_ps.worker.commands.ray_launcher import JobToken, RayCluster, wait_until_ready

    with (
        JobToken(server) as secret,
        RayCluster(run.ray_address, RESTARTS if run.restarts is None else run.restarts) as ray,
    ):
        signals = _record_signals()  # after ray.init, which sets handlers of its own
        count = int(run.workers) if run.workers != "auto" else ray.gpus or WITHOUT_GPU
        job = JobSpec(run, server, dataclasses.replace(worker, insecure=not worker.tls_ca), script, count)
        try:
            shards = server.shards
            ray.reserve(shards * len(job.models), count, worker.threads)
            *servers, master = ray.addresses(shards * len(job.models) + 1)  # the last on the node of worker 0
            texts = []
            for index, model in enumerate(job.models):
                own = servers[index * shards : (index + 1) * shards]
                texts.append(f"{model}={','.join(own)}" if model else ",".join(own))
                for shard in range(shards):
                    variables = job.shard_environment(shard, own, index)
                    ray.start(f"ps{shard} {model}".rstrip(), job.server_command()[1:], variables, secret.token)
            wait_until_ready(servers, secret.access, signals, ray)
            log.info("servers %s", ";".join(texts))
            left = set()
            for rank in range(count if not signals else 0):
                # Ray shows each its own GPU alone, so each is the first of its host.
                variables = job.worker_environment(rank, ";".join(texts), {}, master, one_host=False)
                ray.start(f"w{rank}", job.worker_command()[1:], variables, secret.token)
                left.add(f"w{rank}")
            while left and not signals:
                for name, why in ray.poll_ended():
                    if why or name not in left:
                        raise JobFailed(f"the job ends because {why or f'{name} has ended'}", 1)
                    left.discard(name)
        except PsError as error:
            log.error("%s", error)
            return 1
        if signals:
            log.info("%s: stopping servers and workers", signal.Signals(signals[0]).name)
    return 128 + signals[0] if signals else 0


def _record_signals() -> list[int]:
    """Catch the signals that end a command from now on. Returns the list that their numbers are appended to."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in ending_signals():
        signal.signal(number, note)
    return signals


def run_job(job: JobSpec) -> int:
    """Run ``job`` to its end. Returns the exit code: 0, that of the first child that failed, or 128 + signal."""
    signals = _record_signals()
    with (
        tempfile.TemporaryDirectory(prefix="ps-run-") as folder,
        Processes(on_reader_gone=lambda: signals.append(signal.SIGPIPE)) as children,
    ):
        server = children.start("ps", job.server_command(), job.server_environment(Path(folder, "ready"), os.environ))
        try:
            servers = _wait_until_ready(Path(folder, "ready"), children, server, signals)
            workers: list[Child] = []
            master = free_master()
            for rank in range(job.count if not signals else 0):
                environment = job.worker_environment(rank, servers, os.environ, master)
                workers.append(children.start(f"w{rank}", job.worker_command(), environment))
            _wait_for_workers(children, server, workers, signals)
        except JobFailed as error:
            log.error("%s", error)
            return error.exit_code
        finally:
            # Workers first: if a server ended before them, they would report an error.
            children.stop([child for child in children.running if child is not server])
            children.stop(children.running, job.server_grace, Path(folder, "ready"))
    if signals:
        return 128 + signals[0]
    code = server.exit_code or 0
    if code and (code != KILLED or job.has_checkpoints):  # else nothing is lost with servers that had to be killed
        cut = "; the checkpoint that it was writing is cut short, the one before is good" if server.killed_after else ""
        log.error("all workers have ended well, but %s%s", _explain_end(server), cut)
        return code
    if children.lost:
        log.error("all workers have ended well, but lines of their output are lost: %s", children.lost)
        return 1
    return 0


def _wait_until_ready(file: Path, children: Processes, server: Child, signals: list[int]) -> str:
    """Wait until the servers accept workers. Returns their addresses, "" if a signal came first."""
    slow = SlowStart()
    while not file.exists():
        if signals:
            return ""
        if server in children.poll(POLL_EVERY):
            said = "; its last line above says why" if any(server.last_lines) else ""  # alone, so it is the last
            raise JobFailed(f"the job did not start: {server.ending}{said}", server.exit_code or 1)
        slow.tell()
    ready = json.loads(file.read_text(encoding="utf-8"))
    log.info(
        "servers %s%s", ",".join(ready["servers"]), "".join(f", metrics http://{m}/metrics" for m in ready["metrics"])
    )
    return ",".join(ready["servers"])


def _wait_for_workers(children: Processes, server: Child, workers: list[Child], signals: list[int]) -> None:
    """Wait until all workers have ended with exit code 0, or a signal comes.

    Raises:
        JobFailed: a worker failed, or the servers ended before the workers.
    """
    left = set(workers)
    while left and not signals:
        for child in children.poll(POLL_EVERY):
            if child is server:
                raise JobFailed(f"the job has lost its servers: {_explain_end(child)}", child.exit_code or 1)
            if child.exit_code:
                raise JobFailed(f"the job ends because {_explain_end(child)}", child.exit_code)
            left.discard(child)
    if signals and signals[0] != signal.SIGPIPE:
        log.info("%s: stopping servers and workers", signal.Signals(signals[0]).name)


def _explain_end(child: Child) -> str:
    """How a child ended, and why: its line of a torch-ps error, else its last that names an error, else its last."""
    lines = [line.strip() for line in child.last_lines if line.strip()]
    own = [line for line in lines if line.startswith("Error: ")]
    named = [line for line in lines if _NAMES_ERROR.search(line)]
    return f"{child.ending}: {(own or named or lines)[-1]}" if lines else child.ending


if __name__ == "__main__":
    main()
