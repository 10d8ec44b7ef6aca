"""The servers of a job that die and come back on the same ports: what checkpoints are for.

with shards(2, checkpoint=str(folder), checkpoint_every=4) as servers:
...; servers.kill(); servers.start(resume=True); ...
"""

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.jobs import SECONDS, Addresses, ready, start_server, watched_over
from tests.support.processes import Child
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.rpc.credentials import access_of


class Shards(Addresses):
    """``count`` server processes, with the same addresses in every life."""

    def __init__(self, folder: Path, count: int, settings: dict[str, Any]) -> None:
        files = [str(settings.get(name, "")) for name in ("tls_ca", "tls_cert", "tls_key", "token_file")]
        super().__init__(access=access_of(*files))
        self._folder, self._count, self._settings = folder, count, settings
        self._lives = 0

    @property
    def log(self) -> str:
        """Log of all lives of the server, one after the other."""
        return "\n".join(log.read_text(encoding="utf-8") for log in sorted(self._folder.glob("log*")))

    def start(self, **more: Any) -> None:
        """Start all of them; on the ports that they had before, if they had some."""
        self.processes = []
        for shard in range(self._count):
            self.start_alone(shard, **more)

    def start_alone(self, shard: int, **more: Any) -> None:
        """Start one of them."""
        self._lives += 1
        file = Path(self._folder, f"ready{self._lives}")
        self.processes[shard : shard + 1] = [self._start(shard, file, more)]
        told = ready(self.processes[shard], file)
        if len(self.addresses) <= shard:
            self.addresses += told["servers"]

    def refused(self, shard: int = 0, **more: Any) -> str:
        """Start one of them, which has to end by itself with an error; what it says."""
        log = Path(self._folder, "refused")
        process = self._start(shard, Path(self._folder, "never"), more, log)
        code = process.wait(SECONDS)
        said = process.output
        log.unlink()
        assert code in (1, 2), said
        assert "Traceback" not in said, said
        return said

    def kill(self, *which: int) -> None:
        """SIGKILL, all at once or some."""
        killed = [self.processes[shard] for shard in which or range(self._count)]
        for process in killed:
            process.send(signal.SIGKILL)
        for process in killed:
            process.wait(SECONDS)

    def ended(self, shard: int) -> tuple[int | None, str]:
        """Wait until a server has ended by itself: its exit code, and what it said."""
        process = self.processes[shard]
        return process.wait(SECONDS), process.output

    def stop(self) -> None:
        """SIGTERM; every one has to end well."""
        for process in self.processes:
            process.send(signal.SIGTERM)
        codes = [process.wait(SECONDS) for process in self.processes]
        assert codes == [0] * len(codes), self.log
        assert "Traceback" not in self.log, self.log

    def _start(self, shard: int, file: Path, more: dict[str, Any], log: Path | None = None) -> Child:
        config = ServerConfig(
            **{
                "listen": self.addresses[shard] if shard < len(self.addresses) else "127.0.0.1:0",
                "shard": f"{shard}/{self._count}" if self._count > 1 else "",
                "lead": self.addresses[0] if shard else "",
                "ready_file": str(file),
                **self._settings,
                **more,
            }
        )
        return start_server(config, log or Path(self._folder, f"log{self._lives:03d}"))


@contextlib.contextmanager
def shards(count: int = 1, **settings: Any) -> Iterator[Shards]:
    """Running servers, ended with SIGTERM on leaving; ``settings`` are options of ``ServerConfig``."""
    with tempfile.TemporaryDirectory(prefix="torch-ps-test-") as folder:
        servers = Shards(Path(folder), count, settings)
        with watched_over(servers):
            servers.start()
            yield servers
            servers.stop()
