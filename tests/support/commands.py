"""The commands as a user starts them, each in a process of its own with its output at hand."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import Child

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
PROGRAMS = {
    "ps-serve": "torch_ps.ps.server.cli:main",
    "ps-worker": "torch_ps.worker.commands.worker:main",
    "ps-run": "torch_ps.worker.commands.run:main",
    "ps-status": "torch_ps.worker.commands.status:main",
    "ps-export": "torch_ps.ps.checkpoint.export:main",
}


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str


def environment() -> dict[str, str]:
    """The environment of a fresh interpreter: the caller's, this checkout first on the path, room for tables."""
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(command: str, *arguments: str) -> Result:
    """Run a command to its end."""
    with _folder() as folder:
        out, errors = folder / "out", folder / "errors"
        child = Child(PROGRAMS[command], (list(arguments),), out, errors=errors, environment=environment())
        try:
            code = child.wait(SECONDS)
            assert code is not None, f"{command} still runs after {SECONDS:g} s: {child.output}"
            return Result(code, out.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8"))
        finally:
            child.kill()


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[Child, Path]]:
    """A running ``ps-serve``, once it is ready, and its ready file. It is killed on leaving, if it still runs."""
    with _folder() as folder:
        ready = folder / "ready"
        options = ["--ready-file", str(ready), *arguments]
        server = Child(PROGRAMS["ps-serve"], (options,), folder / "log", environment=environment())
        try:
            _wait_until_ready(server, ready)
            yield server, ready
        except BaseException as error:
            error.add_note(f"log of ps-serve:\n{server.output}")
            raise
        finally:
            server.kill()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torch-ps-test-") as folder:
        yield Path(folder)


def _wait_until_ready(server: Child, ready: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready.exists():
        code = server.wait(0.01)
        assert code is None, f"ps-serve ended with {code}"
        assert time.monotonic() < deadline, f"ps-serve is not ready after {SECONDS:g} s"
