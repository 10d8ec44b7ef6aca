"""ps-run --on ray: the servers and workers of a job as tasks of an existing Ray cluster.

    driver --> placement group: a bundle a shard, a bundle a worker (with a GPU where there are some)
           --> addresses: a port on the node of each shard's bundle
           --> tasks: each runs ps-serve or ps-worker as its child; Ray shows what they write, and runs a task again
               whose child, process or node has died

Rules of this file
  1. Ray schedules, restarts and carries the output; nothing of that is done here.
  2. No gradient and no parameter goes through Ray.
  3. Ray is imported by whoever calls, not by whoever imports this file.

Source: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html, .../fault_tolerance/tasks.html
"""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch_ps.common.errors import ConfigError, PsError, Unreachable
from torch_ps.common.options.config import ServerConfig
from torch_ps.common.parent_death import Lifeline
from torch_ps.common.rpc.credentials import Access, access_of
from torch_ps.common.wire import address
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.run")

#: Seconds in which a cluster has to answer.
CONNECT_SECONDS = 10.0
#: Seconds in which the cluster has to have room for a job.
ROOM_SECONDS = 60.0
#: Seconds in which the servers have to accept work.
START_SECONDS = 180.0
#: Seconds that a child gets to end: a worker's step, a server's last checkpoint.
WORKER_SECONDS, SERVER_SECONDS = 30.0, 90.0
#: Seconds between two looks.
LOOK_EVERY = 0.2
#: Exit code of what was called wrongly, and would be again.
USAGE = 2


class Died(Exception):
    """A child has ended as it should not have; Ray runs its task again."""


def free_address() -> str:
    """On the node: its address in the cluster, and a port that is free now."""
    import ray

    with socket.create_server(("", 0)) as taken:
        return f"{ray.util.get_node_ip_address()}:{taken.getsockname()[1]}"


def child(name: str, command: Sequence[str], told: Mapping[str, str], token: str, folder: str, grace: float) -> int:
    """On the node: run a command to its end, in ``folder`` where that is there. Returns its exit code, 0 or ``USAGE``.

    Args:
        told: variables on top of the node's own, of which none begins with PS_.
        token: the job's secret; empty: ``told`` names a file with it.
        grace: seconds that it gets to end when the task is cancelled.

    Raises:
        Died: it ended in any other way.
    """
    lifeline = Lifeline()
    with tempfile.TemporaryDirectory(prefix="torch-ps-") as own:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PS_")} | lifeline.environment
        environment |= {"PYTHONUNBUFFERED": "1", **told}
        if token:
            environment["PS_TOKEN_FILE"] = _written(Path(own), token)
        where = folder if Path(folder).is_dir() else None
        process = subprocess.Popen([sys.executable, *command], env=environment, cwd=where, pass_fds=lifeline.fds)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY)
        finally:  # Ray cancels a task by an exception in it
            _end(process, grace)
            lifeline.cut()
    if process.returncode in (0, USAGE):
        return process.returncode
    code = process.returncode
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    raise Died(f"{name} ended with {how}")


def _end(process: "subprocess.Popen[bytes]", grace: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Secret:
    """The job's token: one made for this job, unless the options name a file that every node has.

    Attributes:
        token: "" where the options name a file.
        access: TLS and token settings of the driver.
    """

    def __init__(self, server: ServerConfig) -> None:
        self.token = "" if server.token_file else secrets.token_hex(32)
        self._folder = tempfile.TemporaryDirectory(prefix="ps-run-")
        path = server.token_file or _written(Path(self._folder.name), self.token)
        # Each server shows its own certificate to the lead; so does the driver.
        ca = server.tls_ca or server.tls_cert
        self.access = access_of(ca, server.tls_cert, server.tls_key, path, insecure=not ca)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._folder.cleanup()


def _written(folder: Path, token: str) -> str:
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(token, encoding="ascii")
    return str(path)


class Cluster:
    """The part of a Ray cluster that one job has. A context manager: leaving it ends the tasks and gives the room back.

    Args:
        where: address of the cluster; "" is ``$RAY_ADDRESS`` or the one of this host.
        restarts: times that Ray runs one task again.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, where: str, restarts: int) -> None:
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # a line of another worker is another line
        try:
            import ray
            import ray.util.scheduling_strategies
        except ModuleNotFoundError:
            raise ConfigError("--on ray needs Ray: pip install 'torch-ps[ray]'") from None
        self._ray, self._restarts = ray, restarts
        where = where or os.environ.get("RAY_ADDRESS", "")
        try:
            if re.fullmatch(r"[^/]+:[0-9]+", where):  # Ray itself tries for a minute
                socket.create_connection(address.parse(where), CONNECT_SECONDS).close()
            ray.init(address=where or "auto", logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster at {where or 'an address of this host'}: {str(error).splitlines()[0]}; start one with "
                "ray start --head, or name it with --ray-address"
            ) from None
        self._groups: list[Any] = []
        self._running: dict[Any, str] = {}
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        for names in (("w",), ("ps",)):  # workers first: a server that goes before them would give them an error
            chosen = [ref for ref, name in self._running.items() if name.startswith(names)]
            for ref in chosen:
                self._ray.cancel(ref)
            if chosen:
                self._ray.wait(chosen, num_returns=len(chosen), timeout=SERVER_SECONDS)
        for group in self._groups:
            self._ray.util.remove_placement_group(group)
        self._ray.shutdown()

    @property
    def gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0))

    def room(self, shards: int, workers: int, threads: int) -> None:
        """Reserve a bundle for each shard and each worker, all or none.

        Raises:
            PsError: the cluster has no room for them; says what was asked for and what there is.
        """
        gpu = {"GPU": 1} if self.gpus >= workers else {}
        bundles = [{"CPU": 1}] * shards + [{"CPU": threads, **gpu}] * workers
        group = self._ray.util.placement_group(bundles, strategy="SPREAD")
        self._groups.append(group)
        if not group.wait(ROOM_SECONDS):
            has = {k: v for k, v in self._ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise PsError(
                f"the cluster has had no room for {shards} servers of 1 CPU and {workers} workers of {threads} CPU"
                f"{' and 1 GPU' if gpu else ''} for {ROOM_SECONDS:g} s; all of its nodes together have {has}"
            )
        self._bundles = bundles
        log.info(
            "the cluster has room for %d servers and %d workers%s", shards, workers, " with a GPU each" if gpu else ""
        )

    def _task(self, function: Any, bundle: int, **options: Any) -> Any:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._groups[0], placement_group_bundle_index=bundle
        )
        return self._ray.remote(function).options(scheduling_strategy=strategy, **options)

    def addresses(self, shards: int) -> list[str]:
        """Where each shard is to listen: on the node of its bundle."""
        found: list[str] = self._ray.get([self._task(free_address, i, num_cpus=0).remote() for i in range(shards)])
        return found

    def start(self, name: str, command: Sequence[str], told: Mapping[str, str], token: str) -> None:
        """Run a command in the next bundle, and again when it, its task or its node dies.

        A server without checkpoints is not started again: what it had is lost, and the workers know nothing of another.
        """
        bundle, self._started = self._started, self._started + 1
        needs, server = self._bundles[bundle], name.startswith("ps")
        restart = not server or "PS_CHECKPOINT" in told
        task = self._task(
            child,
            bundle,
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            name=name,
            max_retries=self._restarts if restart else 0,
            retry_exceptions=[Died],
        )
        grace = SERVER_SECONDS if server else WORKER_SECONDS
        self._running[task.remote(name, command, told, token, os.getcwd(), grace)] = name

    def ended(self) -> Iterator[tuple[str, str]]:
        """Wait a moment for tasks that end: the name of each, and why it failed, "" if it did not."""
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=LOOK_EVERY)
        for ref in done:
            name = self._running.pop(ref)
            try:
                code = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                yield name, f"{name} could not go on: {_reason(error)}"
            else:
                yield name, f"{name} was called wrongly; its own lines say how" if code else ""


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    return str(cause or error).strip().splitlines()[-1]


def until_ready(servers: Sequence[str], access: Access, signals: Sequence[int], cluster: Cluster) -> None:
    """Wait until every server accepts work, or a signal comes.

    Raises:
        PsError: one has ended, or does not within ``START_SECONDS``.
    """
    deadline = time.monotonic() + START_SECONDS
    for each in servers:
        with contextlib.closing(Link(address.parse(each), access)) as link:
            while not signals:
                for _, why in cluster.ended():
                    raise PsError(f"no job: {why or 'a server has ended'}")
                try:
                    link.describe(LOOK_EVERY * 5)
                    break
                except Unreachable:
                    if time.monotonic() > deadline:
                        raise PsError(f"no job: {each} does not accept work after {START_SECONDS:g} s") from None
