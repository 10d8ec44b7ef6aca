"""ps-run --on ray: runs the servers and workers of a job as tasks of an existing Ray cluster.

    driver --> placement group: one bundle per shard and per worker (with a GPU if the cluster has enough)
           --> addresses: a free port on the node of each shard's bundle
           --> tasks: each runs ps-serve or ps-worker as its child; Ray prints their output and restarts a task
               whose child, process or node has died

Rules of this file
  1. Ray schedules, restarts and forwards output; this file does none of that.
  2. Gradients and parameters do not pass through Ray.
  3. Importing this file does not import Ray; using it does.

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
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.parent_death import Lifeline
from torch_ps.common.rpc.credentials import Access, access_of
from torch_ps.common.wire import address
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.run")

#: Seconds within which the cluster has to answer.
CONNECT_SECONDS = 10.0
#: Seconds within which the cluster has to have free resources for the job.
RESERVE_SECONDS = 60.0
#: Seconds within which the servers have to accept workers.
START_SECONDS = 180.0
#: Seconds between SIGTERM and SIGKILL: a worker finishes its step, a server writes its last checkpoint.
WORKER_SECONDS, SERVER_SECONDS = 30.0, 90.0
#: Seconds between two polls.
POLL_EVERY = 0.2
#: Exit code of a usage error: a restart would fail in the same way.
USAGE = 2


class ChildDied(Exception):
    """A child ended by a signal or with an error; Ray restarts its task."""


def pick_address() -> str:
    """Runs on the node. Returns its address in the cluster with a port that is free now."""
    import ray

    with socket.create_server(("", 0)) as taken:
        return f"{ray.util.get_node_ip_address()}:{taken.getsockname()[1]}"


def run_child(
    name: str, command: Sequence[str], variables: Mapping[str, str], token: str, folder: str, grace: float
) -> int:
    """Runs on the node: runs a command to its end. Returns its exit code, 0 or ``USAGE``.

    Args:
        name: name of the child in messages.
        command: arguments of the Python interpreter.
        variables: environment variables added to the node's own; the node's variables that begin with PS_ are dropped.
        token: the job's token; empty if ``variables`` name a file that holds it.
        folder: working directory, if the node has it.
        grace: seconds between SIGTERM and SIGKILL when the task is cancelled.

    Raises:
        ChildDied: the child ended in any other way.
    """
    lifeline = Lifeline()
    with tempfile.TemporaryDirectory(prefix="torch-ps-") as own:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PS_")} | lifeline.environment
        environment |= {"PYTHONUNBUFFERED": "1", **variables}
        if token:
            environment["PS_TOKEN_FILE"] = _write_token(Path(own), token)
        where = folder if Path(folder).is_dir() else None
        process = subprocess.Popen([sys.executable, *command], env=environment, cwd=where, pass_fds=lifeline.fds)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_EVERY)
        finally:  # Ray cancels a task by raising an exception in it
            _terminate(process, grace)
            lifeline.cut()
    if process.returncode in (0, USAGE):
        return process.returncode
    code = process.returncode
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    raise ChildDied(f"{name} ended with {how}")


def _terminate(process: "subprocess.Popen[bytes]", grace: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class JobToken:
    """The job's token: generated for this job, unless the options name a token file, which every node must have.

    Attributes:
        token: the generated token; "" if the options name a file.
        access: TLS and token settings of the driver.
    """

    def __init__(self, server: ServerConfig) -> None:
        self.token = "" if server.token_file else secrets.token_hex(32)
        self._folder = tempfile.TemporaryDirectory(prefix="ps-run-")
        path = server.token_file or _write_token(Path(self._folder.name), self.token)
        # The driver presents the server certificate, as each server does to the lead.
        ca = server.tls_ca or server.tls_cert
        self.access = access_of(ca, server.tls_cert, server.tls_key, path, insecure=not ca)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._folder.cleanup()


def _write_token(folder: Path, token: str) -> str:
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(token, encoding="ascii")
    return str(path)


class RayCluster:
    """The tasks and resources of one job on a Ray cluster. A context manager: leaving it cancels and releases them.

    Args:
        where: address of the cluster; "" means ``$RAY_ADDRESS``, or a cluster on this host.
        restarts: number of times that Ray restarts one task.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, where: str, restarts: int) -> None:
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # equal lines of two workers are two lines
        try:
            import ray
            import ray.util.scheduling_strategies
        except ModuleNotFoundError:
            raise ConfigError("--on ray needs Ray: pip install 'torch-ps[ray]'") from None
        self._ray, self._restarts = ray, restarts
        where = where or os.environ.get("RAY_ADDRESS", "")
        try:
            if re.fullmatch(r"[^/]+:[0-9]+", where):  # fail fast: Ray itself would try for a minute
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
        for names in (("w",), ("ps",)):  # workers first: if a server ended before them, they would report an error
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

    def reserve(self, shards: int, workers: int, threads: int) -> None:
        """Reserve one bundle for each shard and each worker, all or none.

        Raises:
            PsError: the cluster lacks the resources; the message gives request and total.
        """
        gpu = {"GPU": 1} if self.gpus >= workers else {}
        bundles = [{"CPU": 1}] * shards + [{"CPU": threads, **gpu}] * workers
        group = self._ray.util.placement_group(bundles, strategy="SPREAD")
        self._groups.append(group)
        if not group.wait(RESERVE_SECONDS):
            has = {k: v for k, v in self._ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise PsError(
                f"the Ray cluster lacks room for {shards} servers of 1 CPU and {workers} workers of {threads} CPU"
                f"{' and 1 GPU' if gpu else ''}; waited {RESERVE_SECONDS:g} s; all of its nodes together have {has}"
            )
        self._bundles = bundles
        log.info(
            "reserved resources for %d servers and %d workers%s", shards, workers, " with a GPU each" if gpu else ""
        )

    def _task(self, function: Any, bundle: int, **options: Any) -> Any:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._groups[0], placement_group_bundle_index=bundle
        )
        return self._ray.remote(function).options(scheduling_strategy=strategy, **options)

    def addresses(self, count: int) -> list[str]:
        """An address with a free port on the node of each of the first ``count`` bundles."""
        found: list[str] = self._ray.get([self._task(pick_address, i, num_cpus=0).remote() for i in range(count)])
        return found

    def start(self, name: str, command: Sequence[str], variables: Mapping[str, str], token: str) -> None:
        """Run a command in the next bundle; restart it if it, its task or its node dies.

        A server without checkpoints is not restarted: its parameters would be lost.
        """
        bundle, self._started = self._started, self._started + 1
        needs, server = self._bundles[bundle], name.startswith("ps")
        restart = not server or "PS_CHECKPOINT" in variables
        task = self._task(
            run_child,
            bundle,
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            name=name,
            max_retries=self._restarts if restart else 0,
            retry_exceptions=[ChildDied],
        )
        grace = SERVER_SECONDS if server else WORKER_SECONDS
        self._running[task.remote(name, command, variables, token, os.getcwd(), grace)] = name

    def poll_ended(self) -> Iterator[tuple[str, str]]:
        """Wait up to ``POLL_EVERY`` for a task to end. Yields its name and why it failed, "" if it did not."""
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_EVERY)
        for ref in done:
            name = self._running.pop(ref)
            try:
                code = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                yield name, f"{name} failed: {_reason(error)}"
            else:
                yield name, f"{name} was started with wrong options; see its own output" if code else ""


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    return str(cause or error).strip().splitlines()[-1]


def wait_until_ready(servers: Sequence[str], access: Access, signals: Sequence[int], cluster: RayCluster) -> None:
    """Wait until every server accepts workers, or a signal comes.

    Raises:
        PsError: a server has ended, or does not accept workers within ``START_SECONDS``.
    """
    deadline = time.monotonic() + START_SECONDS
    for each in servers:
        with contextlib.closing(Link(address.parse(each), access)) as link:
            while not signals:
                for _, why in cluster.poll_ended():
                    raise PsError(f"the job did not start: {why or 'a server has ended'}")
                try:
                    link.describe(POLL_EVERY * 5)
                    break
                except Unreachable:
                    if time.monotonic() > deadline:
                        raise PsError(
                            f"the job did not start: {each} does not accept workers after {START_SECONDS:g} s"
                        ) from None
