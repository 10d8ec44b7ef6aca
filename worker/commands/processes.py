"""Starts child processes, forwards their output line by line, and ends them: what ``ps-run`` is made of.

Rules of this file
  1. No child outlives this process: each holds the lifeline. Each leads a session of its own, so Ctrl-C reaches the
     parent alone, and the parent can end a child together with whatever the child has started.
  2. One thread reads all output while it waits. Lines are forwarded whole: children never interrupt each other's lines.
  3. ``stop`` waits for a bounded time, then kills.

    start() --> poll(), poll(), ... --> stop()
                forwards lines as "w0 | ...", returns the children that have ended
"""

import logging
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO, Self

from torch_ps.common.end_patience import Patience
from torch_ps.common.parent_death import Lifeline

log = logging.getLogger("torch_ps.run")

#: Bytes of a line after which it is forwarded in parts.
LONGEST_LINE = 1 << 16
#: Number of last lines of a child that are kept to explain how it ended.
KEPT_LINES = 20
#: Seconds between SIGTERM and SIGKILL.
GRACE = 6.0
#: Seconds of ``GRACE`` in which a worker may finish its step, before SIGTERM is sent again.
STEP_GRACE = 1.0


class Child:
    """One child process.

    Attributes:
        name: prefix of its lines, and its name in messages.
        last_lines: its last ``KEPT_LINES`` lines on stdout and stderr.
        killed_after: seconds that it had to end before this process killed it; 0 if it did not.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.process = process
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.killed_after = 0.0

    @property
    def exit_code(self) -> int | None:
        """Exit code as a shell reports it: 128 + number for a signal. None while the child runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    @property
    def ending(self) -> str:
        """How the child ended, as a clause: "w0 ended with exit code 1"."""
        code = self.process.poll()
        if code is None:
            return f"{self.name} is still running"
        if code >= 0:
            return f"{self.name} ended with exit code {code}"
        if self.killed_after:
            return f"{self.name} did not end within {self.killed_after:g} s and was killed"
        try:
            name = signal.Signals(-code).name
            out_of_memory = " (as the system does to a process where memory runs out)" if name == "SIGKILL" else ""
            return f"{self.name} was killed by {name}{out_of_memory}"
        except ValueError:
            return f"{self.name} was killed by signal {-code}"


class _Forwarder:
    """Copies one output stream of a child to one of this process, for as long as somebody reads that.

    Lines that cannot be written, as where the disk is full, are lost, and ``on_lost`` is called.
    """

    def __init__(
        self,
        child: Child,
        stream: BinaryIO,
        target: BinaryIO,
        on_reader_gone: Callable[[], object] | None,
        on_lost: Callable[[Child, OSError], object],
    ) -> None:
        os.set_blocking(stream.fileno(), False)
        self.child, self.stream, self.target = child, stream, target
        self._on_reader_gone, self._reader_gone, self._on_lost = on_reader_gone, False, on_lost
        self._rest = b""

    def forward(self) -> bool:
        """Forward what can be read without waiting. Returns False at the end of the stream."""
        with suppress(BlockingIOError):
            while data := os.read(self.stream.fileno(), LONGEST_LINE):
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._write(lines)
                if len(self._rest) >= LONGEST_LINE:
                    self.flush()
            return False
        return True

    def flush(self) -> None:
        """Forward a last line that has no newline."""
        if self._rest:
            rest, self._rest = self._rest, b""
            self._write([rest])

    def _write(self, lines: Sequence[bytes]) -> None:
        name = self.child.name.encode()
        for line in lines:
            self.child.last_lines.append(line.decode(errors="replace"))
        if self._reader_gone:
            return
        try:
            self.target.write(b"".join(b"%s | %s\n" % (name, line) for line in lines))
            self.target.flush()
        except BrokenPipeError:
            if self._on_reader_gone is None:
                raise
            self._reader_gone = True
            self._on_reader_gone()
        except OSError as error:  # a log on a full disk ends no job, least of all before its last checkpoint
            self._on_lost(self.child, error)


class Processes:
    """The children of this process. A context manager: leaving it ends those that still run.

    Args:
        out: target of their stdout; None means this process's own.
        err: target of their stderr; None means this process's own.
        on_reader_gone: called when nobody reads a target any more, whose lines are dropped from then on; None raises
            BrokenPipeError.

    Attributes:
        lost: reason why lines were lost, such as "No space left on device"; "" if none were.
    """

    def __init__(
        self,
        out: BinaryIO | None = None,
        err: BinaryIO | None = None,
        on_reader_gone: Callable[[], object] | None = None,
    ) -> None:
        self._out, self._err = out or sys.stdout.buffer, err or sys.stderr.buffer
        self._on_reader_gone = on_reader_gone
        self._lifeline = Lifeline()
        self._selector = selectors.DefaultSelector()
        self._running: list[Child] = []
        self.lost = ""

    @property
    def running(self) -> tuple[Child, ...]:
        return tuple(self._running)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start a child. The program has to call ``torch_ps.common.parent_death.hold``.

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
            forwarder = _Forwarder(child, stream, target, self._on_reader_gone, self._on_lost)  # type: ignore[arg-type]  # PIPE: not None
            self._selector.register(stream, selectors.EVENT_READ, forwarder)  # type: ignore[arg-type]
        self._running.append(child)
        return child

    def poll(self, seconds: float) -> list[Child]:
        """Wait up to ``seconds`` for output and forward it. Returns the children that have ended."""
        for key, _ in self._selector.select(seconds):
            if not key.data.forward():
                self._forget(key.data)
        ended = [child for child in self._running if child.process.poll() is not None]
        for child in ended:
            self._finish(child)
        return ended

    def stop(self, children: Iterable[Child], grace: float = GRACE, works: str | os.PathLike[str] = "") -> None:
        """End ``children``: SIGTERM, SIGTERM again after ``STEP_GRACE``, SIGKILL after ``grace`` seconds.

        Args:
            children: those of them that run.
            grace: seconds that they have.
            works: file with which they say that they still work, after which they have as long again; "": none.
        """
        chosen = [child for child in children if child in self._running]
        for seconds in (min(STEP_GRACE, grace), max(grace - STEP_GRACE, 0.0)):
            for child in chosen:
                child.process.terminate()
            patience = Patience(works, seconds)
            while any(child in self._running for child in chosen) and not patience.over:
                self.poll(0.05)
        for child in chosen:
            if child in self._running:
                child.killed_after = grace
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
        finally:  # also if our own output was closed
            for child in self.running:
                self._kill(child)
                child.process.wait()
            self._selector.close()
            self._lifeline.cut()

    def _on_lost(self, child: Child, error: OSError) -> None:
        if not self.lost:
            self.lost = str(error.strerror or error)
            log.warning("lines of %s are lost, and the job goes on: %s", child.name, self.lost)

    def _finish(self, child: Child) -> None:
        """Forward the last output of a child that has ended, and kill what it has left behind."""
        self._running.remove(child)
        self._kill(child)
        for key in [key for key in self._selector.get_map().values() if key.data.child is child]:
            key.data.forward()
            self._forget(key.data)

    def _forget(self, forwarder: _Forwarder) -> None:
        self._selector.unregister(forwarder.stream)
        forwarder.flush()
        forwarder.stream.close()

    @staticmethod
    def _kill(child: Child) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
