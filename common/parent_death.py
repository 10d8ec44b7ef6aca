"""Lifeline: a child process ends when its parent does, however the parent ends.

The parent holds the write end of a pipe and never writes; the child reads. The kernel closes the parent's end whatever
kills the parent, SIGKILL included, and the child's read returns.

    parent: Lifeline() --fd in $PS_LIFELINE--> child: hold()
"""

import contextlib
import os
import signal
import threading
import time

VARIABLE = "PS_LIFELINE"

#: Seconds that a child gets to end after SIGTERM before it exits at once.
GRACE = 5.0


class Lifeline:
    """The parent's end. Pass ``fds`` as ``pass_fds`` and ``environment`` to every child; keep the object alive."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.fds = (self._read,)
        self.environment = {VARIABLE: str(self._read)}

    def cut(self) -> None:
        """Close the pipe, so that the children end as if this process had ended."""
        os.close(self._write)
        os.close(self._read)


def hold() -> None:
    """In a child, at its start: from now on the end of the parent sends SIGTERM, and ``GRACE`` later exits."""
    text = os.environ.pop(VARIABLE, "")
    if text.isdigit():
        threading.Thread(target=_watch, args=(int(text),), name="lifeline", daemon=True).start()


def _watch(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.read(fd, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
