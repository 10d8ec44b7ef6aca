"""Child processes with their output: started, listened to, ended; what ``ps-run`` is made of.

Rules of this file
  1. No child outlives this process: each holds the lifeline. Each leads a session of its own: Ctrl-C reaches the parent
     alone, and the parent can end a child together with whatever the child has started.
  2. One thread: output is read while waiting, line by line, and a line of one child is never torn by another's.
  3. Whoever asks for an end waits for a bounded time, then forces it.

    start() --> look(), look(), ... --> stop()
                copies lines "w0 | ...", reports who has ended
"""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO, Self

from torch_ps.common.parent_death import Lifeline

#: A line longer than this is passed on in parts.
LONGEST_LINE = 1 << 16
#: Last lines of a child that are kept to explain its end.
KEPT_LINES = 20
#: Seconds that children get to end well.
GRACE = 6.0
#: Seconds of these in which a worker may finish its step.
STEP_GRACE = 1.0


class Child:
    """One child process.

    Attributes:
        name: name in front of its lines and in messages.
        last_lines: what it said last, on either stream.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.process = process
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)

    @property
    def exit_code(self) -> int | None:
        """As a shell counts: 128 + number for a signal. None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    @property
    def end(self) -> str:
        """How it ended, in words."""
        code = self.process.poll()
        if code is None:
            return f"{self.name} still runs"
        if code >= 0:
            return f"{self.name} ended with exit code {code}"
        try:
            return f"{self.name} was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"{self.name} was ended by signal {-code}"


class _Source:
    """One output stream of a child on its way to one of ours."""

    def __init__(self, child: Child, stream: BinaryIO, target: BinaryIO) -> None:
        os.set_blocking(stream.fileno(), False)
        self.child, self.stream, self.target = child, stream, target
        self._rest = b""

    def copy(self) -> bool:
        """Pass on what is there. False at the end of the stream."""
        with suppress(BlockingIOError):
            while data := os.read(self.stream.fileno(), LONGEST_LINE):
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._write(lines)
                if len(self._rest) >= LONGEST_LINE:
                    self.flush()
            return False
        return True

    def flush(self) -> None:
        """Pass on a last line without its end."""
        if self._rest:
            rest, self._rest = self._rest, b""
            self._write([rest])

    def _write(self, lines: Iterable[bytes]) -> None:
        name = self.child.name.encode()
        for line in lines:
            self.child.last_lines.append(line.decode(errors="replace"))
            self.target.write(b"%s | %s\n" % (name, line))
        self.target.flush()


class Processes:
    """The children of this process. A context manager: leaving it ends those that are left.

    Args:
        out, err: streams for their stdout and stderr; those of this process if None.
    """

    def __init__(self, out: BinaryIO | None = None, err: BinaryIO | None = None) -> None:
        self._out, self._err = out or sys.stdout.buffer, err or sys.stderr.buffer
        self._lifeline = Lifeline()
        self._selector = selectors.DefaultSelector()
        self._running: list[Child] = []

    @property
    def running(self) -> tuple[Child, ...]:
        return tuple(self._running)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start a child; it has to call ``torch_ps.common.parent_death.hold``.

        Raises:
            OSError: the program cannot be started.
        """
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **self._lifeline.environment, "PYTHONUNBUFFERED": "1"},
            pass_fds=self._lifeline.fds,
            start_new_session=True,
        )
        child = Child(name, process)
        for stream, target in ((process.stdout, self._out), (process.stderr, self._err)):
            source = _Source(child, stream, target)  # type: ignore[arg-type]  # PIPE was given, so it is there
            self._selector.register(stream, selectors.EVENT_READ, source)  # type: ignore[arg-type]
        self._running.append(child)
        return child

    def look(self, seconds: float) -> list[Child]:
        """Pass on output for at most ``seconds``, less if there is some. Returns the children that have ended since."""
        for key, _ in self._selector.select(seconds):
            if not key.data.copy():
                self._forget(key.data)
        ended = [child for child in self._running if child.process.poll() is not None]
        for child in ended:
            self._finish(child)
        return ended

    def stop(self, children: Iterable[Child], grace: float = GRACE) -> None:
        """End ``children``: SIGTERM, again for those that still finish their step, SIGKILL after ``grace`` seconds."""
        chosen = [child for child in children if child in self._running]
        for seconds in (min(STEP_GRACE, grace), max(grace - STEP_GRACE, 0.0)):
            for child in chosen:
                child.process.terminate()
            deadline = time.monotonic() + seconds
            while any(child in self._running for child in chosen) and time.monotonic() < deadline:
                self.look(0.05)
        for child in chosen:
            if child in self._running:
                self._kill(child)
                child.process.wait()
                self._finish(child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop(self.running)
        finally:  # also when our own output is gone
            for child in self.running:
                self._kill(child)
                child.process.wait()
            self._selector.close()
            self._lifeline.cut()

    def _finish(self, child: Child) -> None:
        """The child has ended: pass on its last words and end what it has left behind."""
        self._running.remove(child)
        self._kill(child)
        for key in [key for key in self._selector.get_map().values() if key.data.child is child]:
            key.data.copy()
            self._forget(key.data)

    def _forget(self, source: _Source) -> None:
        self._selector.unregister(source.stream)
        source.flush()
        source.stream.close()

    @staticmethod
    def _kill(child: Child) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
