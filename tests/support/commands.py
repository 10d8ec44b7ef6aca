"""The commands as a user starts them: a fresh interpreter each, with its output at hand.

Slower by the seconds that torch takes to load; for what ``tests.support.processes`` cannot show.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
MODULES = {
    "ps-serve": "torch_ps.ps.server.cli",
    "ps-run": "torch_ps.worker.commands.run",
    "ps-status": "torch_ps.worker.commands.status",
    "ps-export": "torch_ps.ps.checkpoint.export",
}


def environment() -> dict[str, str]:
    """The caller's, with this checkout first on the path and room for tables."""
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", MODULES[command], *arguments],
        env=environment(),
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A running ``ps-serve``, once it is ready, and its ready file. It is ended with its children on leaving."""
    with tempfile.TemporaryDirectory(prefix="torch-ps-test-") as folder:
        ready, log = Path(folder, "ready"), Path(folder, "log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULES["ps-serve"], "--ready-file", str(ready), *arguments],
                env=environment(),
                stderr=output,
                text=True,
            )
        try:
            _until_ready(process, ready)
            yield process, ready
        except BaseException as error:
            error.add_note(f"log of ps-serve:\n{log.read_text(encoding='utf-8')}")
            raise
        finally:
            process.kill()
            process.wait(SECONDS)


def _until_ready(process: "subprocess.Popen[str]", ready: Path) -> None:
    for _ in range(int(SECONDS / 0.02)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"ps-serve ended with {process.wait(0.02)}")
        if ready.exists():
            return
    raise AssertionError(f"ps-serve is not ready after {SECONDS:g} s")
