"""Standard streams of a command: closed ones lead to /dev/null, and a reader that has gone ends the command quietly.

Rules of this file
  1. A closed standard stream is opened before anything else is, or a file or socket would get its number, and print
     would write into that.
  2. A broken pipe of any other file is an error like others: only stdout and stderr end a command quietly.

Source: signal(7) for SIGPIPE, which Python ignores; a shell reports 141 of a process that it has ended.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
#: Exit code of a command whose reader has gone.
READER_GONE = 128 + signal.SIGPIPE


def open_closed() -> None:
    """Open /dev/null in the place of each closed standard stream."""
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the process's life


@contextlib.contextmanager
def quiet_without_reader() -> Iterator[None]:
    """Around a command: end it with ``READER_GONE`` and no word when nobody reads its output any more.

    Raises:
        OSError: The output cannot be written for another reason, such as a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        if not (_reader_gone(1) or _reader_gone(2)):
            raise
        sys.exit(READER_GONE)
    finally:
        if not _flushed():
            sys.exit(READER_GONE)


def _flushed() -> bool:
    """Write what is buffered. Returns False if nobody reads it any more.

    A stream that fails leads to /dev/null from then on, or the interpreter would complain about it at its end.
    """
    failures = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            failures.append(error)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
    for failure in failures:
        if not isinstance(failure, BrokenPipeError):
            raise failure
    return not failures


def _reader_gone(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
