"""Jobs that an engine starts: what the docs say is typed, who the processes are, what their workers say in the end."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.jobs import SECONDS
from tests.support.processes import children_of

ROOT = Path(__file__).parents[2]

#: Percent of the digits that a job names right which has learned what it should; the best is about 98.
LEARNED = 95.0

_ACCURACY = re.compile(r"digits not trained on: ([0-9.]+)%|validation: .*accuracy ([0-9.]+)")


def environment(**variables: str) -> dict[str, str]:
    """The caller's, with this checkout first on the path and the commands of this interpreter before others."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **variables}


class Started:
    """A command that runs in a session of its own, with its output in a file."""

    def __init__(self, command: str | Sequence[str], log: Path, variables: dict[str, str]) -> None:
        self._log = log
        line = command if isinstance(command, str) else shlex.join(command)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", line],
                cwd=log.parent,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ends_within(self, seconds: float) -> bool:
        """Wait so long for its end, which is not expected, at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.running

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 2 * SECONDS) -> int:
        """Its exit code."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """End it with all that is left of its session; never fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def started(folder: Path, /, **commands: tuple[str | Sequence[str], dict[str, str]]) -> Iterator[list[Started]]:
    """Commands by name, each with variables of its own; what they said is shown where the test fails."""
    running: list[Started] = []
    try:
        for name, (command, variables) in commands.items():
            running.append(Started(command, folder / f"{name}.log", environment(**variables)))
        yield running
    except BaseException as error:
        for name, process in zip(commands, running, strict=False):
            error.add_note(f"{name} said:\n{process.said}")
        raise
    finally:
        for process in running:
            process.kill()


def ends_well(folder: Path, command: str, **variables: str) -> str:
    """Run a command, which has to end well; returns its output."""
    with started(folder, command=(command, variables)) as (process,):
        assert process.wait() == 0, process.said
        return process.said


def accuracies(output: str) -> list[float]:
    """What the workers of a digits job have measured, in percent."""
    return [float(a) if a else 100 * float(b) for a, b in _ACCURACY.findall(output)]


def process_with(word: str = "", /, below: int = 0, **variables: str) -> int:
    """The process that has these variables, and ``word`` in its command; only those ``below`` another one if given.

    Raises:
        LookupError: there is none.
    """
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    for pid in _descendants(below) if below else (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            told = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            if wanted <= told and word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise LookupError(f"no process {word} with {variables}")


def _descendants(pid: int) -> list[int]:
    return [each for child in children_of(pid) for each in (child, *_descendants(child))]


def free_port() -> int:
    """A port of 127.0.0.1 for a program that has to be told one; another may take it before that listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
