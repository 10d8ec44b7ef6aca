"""A real job in one line: server processes on free ports, and an end that is checked.

    with job(mode="async", workers=2, shards=2) as servers:
        with torch_ps.Client(str(servers), name="w0") as c: ...

On leaving, every server has to end with exit code 0 on SIGTERM, and its log must hold neither a traceback nor a bug.
"""

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.support.processes import Child
from torch_ps.common.options.command_line import arguments_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import OPEN, Access
from torch_ps.common.wire import address
from torch_ps.worker.transport.link import Link

#: Seconds in which anything that a test waits for has to happen.
SECONDS = 60.0
PROGRAM = "torch_ps.ps.server.cli:main"


@dataclass
class Addresses:
    """The servers of one job; as text, what ``servers`` of a client wants. ``access`` is how they are asked."""

    addresses: list[str] = field(default_factory=list)
    processes: list[Child] = field(default_factory=list)
    access: Access = OPEN

    def __str__(self) -> str:
        return ",".join(self.addresses)

    def status(self, shard: int = 0) -> pb.StatusReply:
        with self._link(shard) as link:
            return link.status(SECONDS)

    @property
    def incarnation(self) -> int:
        """Number of the incarnation that the lead names now."""
        return self.described().incarnation

    def described(self, shard: int = 0) -> pb.JobDescription:
        """Description of the job by the server of a shard."""
        with self._link(shard) as link:
            return link.describe(SECONDS)

    @contextlib.contextmanager
    def _link(self, shard: int) -> Iterator[Link]:
        link = Link(address.parse(self.addresses[shard]), self.access)
        try:
            yield link
        finally:
            link.close()


@dataclass
class Servers(Addresses):
    """Servers that live as long as the job."""

    metrics: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "\n".join(process.output for process in self.processes)


@contextlib.contextmanager
def job(
    *,
    mode: str = "sync",
    workers: int = 1,
    shards: int = 1,
    lease: float = 15.0,
    bucket_size: float = 4.0,
    threads: int = 1,
    **settings: Any,
) -> Iterator[Servers]:
    """``settings`` are further options of ``ServerConfig``; ``program``, if it is given, takes all of them as flags."""
    program = settings.pop("program", PROGRAM)
    of_lead = {name: settings.pop(name) for name in ("trace", "trace_steps") if name in settings}
    with tempfile.TemporaryDirectory(prefix="torch-ps-test-") as folder:
        servers = Servers()
        with watched_over(servers):
            for shard in range(shards):
                config = ServerConfig(
                    listen="127.0.0.1:0",
                    mode=mode,
                    workers=workers,
                    shard=f"{shard}/{shards}" if shards > 1 else "",
                    lead=servers.addresses[0] if shard else "",
                    lease=lease,
                    bucket_size=bucket_size,
                    apply_threads=threads,
                    ready_file=str(Path(folder, f"ready{shard}")),
                    **settings,
                    **({} if shard else of_lead),
                )
                servers.processes.append(start_server(config, Path(folder, f"log{shard}"), program))
                if not shard:
                    _ready(servers, shard, config.ready_file)  # the others need its address
            for shard in range(1, shards):
                _ready(servers, shard, str(Path(folder, f"ready{shard}")))
            yield servers
            for process in servers.processes:
                process.send(signal.SIGTERM)
            codes = [process.wait(SECONDS) for process in servers.processes]
            assert codes == [0] * shards, servers.log


class Logged(Protocol):
    """Processes, and what they have written."""

    @property
    def processes(self) -> Sequence[Child]: ...
    @property
    def log(self) -> str: ...


@contextlib.contextmanager
def watched_over(servers: Logged) -> Iterator[None]:
    """An error carries the servers' log, none of which may hold a traceback; no process stays behind."""
    try:
        yield
        assert "Traceback" not in servers.log, servers.log
        assert " bug " not in servers.log, servers.log
    except BaseException as error:
        error.add_note(f"log of the servers:\n{servers.log}")
        raise
    finally:
        for process in servers.processes:
            process.kill()


def start_server(config: ServerConfig, log: Path, program: str = PROGRAM) -> Child:
    """``ps-serve`` with the options of ``config``."""
    return Child(program, (arguments_of(config),), log)


def ready(process: Child, file: Path) -> dict[str, list[str]]:
    """Content of the ready file of a server."""
    deadline = time.monotonic() + SECONDS
    while not file.exists():
        code = process.wait(0.005)
        assert code is None, f"a server ended with {code}: {process.output}"
        assert time.monotonic() < deadline, f"a server is not ready after {SECONDS:g} s"
    told: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return told


def _ready(servers: Servers, shard: int, file: str) -> None:
    told = ready(servers.processes[shard], Path(file))
    servers.addresses += told["servers"]
    servers.metrics += told["metrics"]


def until(true: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Ask again until it is so. ``true`` has to take time itself, as a call to a server does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds:g} s not yet: {what}"
