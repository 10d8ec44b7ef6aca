"""A job whose shards have standbys, all real processes.

    with replicated(2, workers=2) as servers:
        ...; servers.kill(0); ...; servers.standby(0)

As text it is what workers start with: the addresses of the servers that serve. They hear of the standbys from them.
"""

import contextlib
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.support.jobs import SECONDS, ready, start_server, until, watched_over
from tests.support.processes import Child
from torch_ps.common.errors import PsError
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import access_of
from torch_ps.common.wire import address
from torch_ps.worker.transport.link import Link

#: Options that files of a process are named by, for whoever asks it.
ACCESS = ("tls_ca", "tls_cert", "tls_key", "token_file")


Kind = TypeVar("Kind", bound="Replicated")


@dataclass
class Server:
    """One server process, and where it listens."""

    process: Child
    address: str


class Replicated:
    """``count`` shards. ``primaries`` and ``standbys`` are by shard, as they were started."""

    def __init__(self, folder: Path, count: int, settings: dict[str, Any], of_standbys: dict[str, Any]) -> None:
        self._folder, self._count, self._settings, self._of_standbys = folder, count, settings, of_standbys
        self._access = access_of(*(str(settings.get(name, "")) for name in ACCESS))
        self.primaries: list[Server] = []
        self.standbys: list[Server] = []
        self.all: list[Server] = []

    def __str__(self) -> str:
        return ",".join(each.address for each in self.primaries)

    @property
    def log(self) -> str:
        return "\n".join(f"--- {server.address}\n{server.process.output}" for server in self.all)

    @property
    def processes(self) -> list[Child]:
        return [server.process for server in self.all]

    def start(self) -> None:
        for shard in range(self._count):
            shards = {"shard": f"{shard}/{self._count}"} if self._count > 1 else {}
            lead = {"lead": self.primaries[0].address} if shard else {}
            self.primaries.append(self.server(**self._settings, **shards, **lead))
        for shard in range(self._count):
            self.standbys.append(self.standby(self.primaries[shard].address))

    def standby(self, primary: str) -> Server:
        """Start a standby of the server at ``primary``; it takes the job's options over from there."""
        access = {name: self._settings[name] for name in ACCESS if name in self._settings}
        return self.server(standby_of=primary, **access, **self._of_standbys)

    def server(self, **options: Any) -> Server:
        number = len(self.all)
        file = Path(self._folder, f"ready{number}")
        config = ServerConfig(**{"listen": "127.0.0.1:0", "ready_file": str(file), **options})
        process = start_server(config, Path(self._folder, f"log{number}"))
        found = Server(process, ready(process, file)["servers"][0])
        self.all.append(found)
        return found

    def status(self, server: Server, seconds: float = SECONDS) -> pb.StatusReply:
        link = Link(address.parse(server.address), self._access)
        try:
            return link.status(seconds)
        finally:
            link.close()

    def role(self, server: Server) -> str:
        """Role of a server; "" if it does not answer, or has never been one of a pair."""
        try:
            return self.status(server).standby.role
        except PsError:
            return ""

    def paired(self) -> bool:
        """Whether every shard acknowledges only what its standby has."""
        try:
            found = [self.status(each).standby for each in self.primaries]
        except PsError:
            return False
        return all(each.role == "paired" and each.configuration.standby for each in found)

    def wait(self) -> None:
        """Until they do."""
        until(self.paired, "every shard has its standby")

    def kill(self, *shards: int) -> None:
        """SIGKILL primaries."""
        for shard in shards:
            self.primaries[shard].process.send(signal.SIGKILL)

    def stop(self, *servers: Server) -> None:
        """SIGTERM; every one has to end well."""
        for each in servers:
            each.process.send(signal.SIGTERM)
        codes = [each.process.wait(SECONDS) for each in servers]
        assert codes == [0] * len(codes), self.log


@contextlib.contextmanager
def running(make: Callable[[Path], Kind]) -> Iterator[Kind]:
    """Servers, made with a folder for their files; ended on leaving. Whatever happened, no log may hold a traceback."""
    with tempfile.TemporaryDirectory(prefix="torch-ps-test-") as folder:
        servers = make(Path(folder))
        with watched_over(servers):
            servers.start()
            yield servers


def replicated(
    count: int = 1, *, of_standbys: dict[str, Any] | None = None, **settings: Any
) -> AbstractContextManager[Replicated]:
    """Servers with standbys.

    Args:
        of_standbys: options of the standbys alone, as ``settings`` are of the primaries.
    """
    return running(lambda folder: Replicated(folder, count, settings, of_standbys or {}))
