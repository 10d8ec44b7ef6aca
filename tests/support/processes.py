"""Child processes that start in milliseconds: forked from a process that has loaded torch and gRPC already.

    test --asks--> fork server (torch, gRPC and the server's modules loaded, nothing started) --fork--> child

A child is a process of its own as if it had been started by its command; only the two seconds of imports are shared.

Source: https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods
"""

import contextlib
import importlib
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])

#: Seconds that a child gets to end once it was told to.
END_SECONDS = 20.0


class Child:
    """A process that runs ``module:function`` with ``arguments``.

    The function is named, not passed, so that no test module is loaded in the child.

    Args:
        log: the file of its stdout and stderr.
        errors: the file of its stderr, if that is another one.
        environment: variables that are set in it, beside those of the fork server.
    """

    def __init__(
        self,
        function: str,
        arguments: tuple[Any, ...],
        log: Path,
        *,
        errors: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        files = (str(log), str(errors or log))
        self._process = _context.Process(target=_run, args=(function, arguments, files, environment or {}), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Exit code (negative: the signal that killed it), or None if it still runs after ``seconds``."""
        self._process.join(seconds)
        return self._process.exitcode

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; its exit code."""
        self.send(number)
        code = self.wait(END_SECONDS)
        assert code is not None, f"still runs {END_SECONDS:g} s after signal {number}:\n{self.output}"
        return code

    def kill(self) -> None:
        """End it, however it is; never fails."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(END_SECONDS)


def _run(function: str, arguments: tuple[Any, ...], files: tuple[str, str], environment: dict[str, str]) -> None:
    """In the child."""
    for stream, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.update(environment)
    module, _, name = function.partition(":")
    target: Callable[..., Any] = getattr(importlib.import_module(module), name)
    target(*arguments)
    sys.stdout.flush()


def children_of(pid: int) -> list[int]:
    """Processes that ``pid`` has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def ended(handle: int, seconds: float) -> bool:
    """Whether the process of this pidfd is gone by then. Unlike select, poll takes a handle of any number."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@contextlib.contextmanager
def watched(pids: list[int]) -> Iterator[Callable[[float], list[int]]]:
    """Handles on processes that are not ours; call the result to wait for their end and get those still there."""
    handles = {os.pidfd_open(pid): pid for pid in pids}

    def left(seconds: float) -> list[int]:
        return [pid for handle, pid in handles.items() if not ended(handle, seconds)]

    try:
        yield left
    finally:
        for handle in handles:
            os.close(handle)
