"""The servers of a job that die and come back on the same ports: what checkpoints are for.

with shards(2, checkpoint=str(folder), checkpoint_every=4) as servers:
...; servers.kill(); servers.start(resume=True); ...
"""

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.jobs import SECONDS, start_server
from tests.support.processes import Child
from torch_ps.common import address
from torch_ps.common.config import ServerConfig
from torch_ps.common.credentials import access_of
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.transport import Link


class Shards:
    """``count`` server processes. As text: their addresses, the same in every life."""

    def __init__(self, folder: Path, count: int, settings: dict[str, Any]) -> None:
        self._folder, self._count, self._settings = folder, count, settings
        self._lives = 0
        files = [str(settings.get(name, "")) for name in ("tls_ca", "tls_cert", "tls_key", "token_file")]
        self._access = access_of(*files)
        self.addresses: list[str] = []
        self.processes: list[Child] = []

    def __str__(self) -> str:
        return ",".join(self.addresses)

    @property
    def log(self) -> str:
        """Of all lives."""
        return "\n".join(log.read_text(encoding="utf-8") for log in sorted(self._folder.glob("log*")))

    def start(self, **more: Any) -> None:
        """Start all of them; on the ports that they had before, if they had some."""
        self._lives += 1
        self.processes = []
        for shard in range(self._count):
            ready = Path(self._folder, f"ready{self._lives}-{shard}")
            self.processes.append(self._start(shard, ready, more))
            told = self._wait(ready)
            if len(self.addresses) <= shard:
                self.addresses += told["servers"]

    def refused(self, **more: Any) -> str:
        """Start shard 0, which has to end by itself with an error; what it says."""
        log = Path(self._folder, "refused")
        process = self._start(0, Path(self._folder, "never"), more, log)
        code = process.wait(SECONDS)
        said = process.output
        log.unlink()
        assert code in (1, 2), said
        assert "Traceback" not in said, said
        return said

    def kill(self) -> None:
        """SIGKILL, all at once."""
        for process in self.processes:
            process.send(signal.SIGKILL)
        for process in self.processes:
            process.wait(SECONDS)

    def stop(self) -> None:
        """SIGTERM; every one has to end well."""
        for process in self.processes:
            process.send(signal.SIGTERM)
        codes = [process.wait(SECONDS) for process in self.processes]
        assert codes == [0] * len(codes), self.log
        assert "Traceback" not in self.log, self.log

    def status(self, shard: int = 0) -> pb.StatusReply:
        link = Link(address.parse(self.addresses[shard]), self._access)
        try:
            return link.status(SECONDS)
        finally:
            link.close()

    def _start(self, shard: int, ready: Path, more: dict[str, Any], log: Path | None = None) -> Child:
        config = ServerConfig(
            **{
                "listen": self.addresses[shard] if shard < len(self.addresses) else "127.0.0.1:0",
                "shard": f"{shard}/{self._count}" if self._count > 1 else "",
                "lead": self.addresses[0] if shard else "",
                "ready_file": str(ready),
                **self._settings,
                **more,
            }
        )
        return start_server(config, log or Path(self._folder, f"log{self._lives}-{shard}"))

    def _wait(self, ready: Path) -> dict[str, Any]:
        process, deadline = self.processes[-1], time.monotonic() + SECONDS
        while not ready.exists():
            code = process.wait(0.005)
            assert code is None, f"a server ended with {code}"
            assert time.monotonic() < deadline, f"a server is not ready after {SECONDS:g} s"
        told: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
        return told


@contextlib.contextmanager
def shards(count: int = 1, **settings: Any) -> Iterator[Shards]:
    """Running servers, ended with SIGTERM on leaving; ``settings`` are options of ``ServerConfig``."""
    with tempfile.TemporaryDirectory(prefix="torch-ps-test-") as folder:
        servers = Shards(Path(folder), count, settings)
        try:
            servers.start()
            yield servers
            servers.stop()
        except BaseException as error:
            error.add_note(f"log of the servers:\n{servers.log}")
            raise
        finally:
            for process in servers.processes:
                process.kill()
