"""The end of a member of a job: closed, dropped, at the exit of its process, or left behind in a forked one.

    close()              end(): every part closes, the last one first
    last reference gone  the same, on a thread of its own if another thread than the main one has dropped it
    exit of the process  the same
    os.fork()            before_fork() in the parent: what is shared with servers moves out of what the child copies
                         after_fork_in_child(): nobody is told, nothing is waited for

Rules of this file
  1. A forked child is nobody's worker. It has the model of the moment of the fork, and takes no lock that another
     thread may have held at that moment.
  2. Nothing that a lifetime holds refers to the member, for such a member would never be dropped.
  3. A garbage collection may drop a member on a thread that belongs to it, in the middle of a call that holds locks.
     Nothing is closed there.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec

from torch_ps.common.errors import PsError

log = logging.getLogger("torch_ps.worker")

P = ParamSpec("P")


class Part:
    """A part of a member that ends with it."""

    def close(self) -> None:
        """Give back threads, files, hooks and memory; may take leave of others. Called once."""

    def before_fork(self) -> None:
        """Move what is shared with other processes out of the memory that a forked child copies."""

    def after_fork_in_child(self) -> None:
        """Forget everything, in a forked child: take no lock, tell nobody, call nothing of gRPC or CUDA."""


class Lifetime:
    """The life of one member of a job, which ends once.

    Args:
        member: optimizer or client; the life ends when it is dropped, too.
        name: name of the worker.
        first: part that closes last.

    Attributes:
        name: name of the worker.
    """

    def __init__(self, member: object, name: str, first: Part) -> None:
        global _last_member
        _last_member = name
        self.name, self._parts = name, [first]
        self._finalizer = weakref.finalize(member, self._drop)
        self._finalizer.atexit = False  # for ``end`` is called then, before the modules that it needs are gone
        atexit.register(self.end)
        _live.add(self)

    def add(self, part: Part) -> None:
        """Add a part, which closes before those that were added earlier."""
        self._parts.append(part)

    def discard(self, part: Part | None) -> None:
        """Forget a part, which ends earlier than the member. Nothing happens if it is none."""
        self._parts = [each for each in self._parts if each is not part]

    def end(self) -> None:
        """Close all parts. A second call does nothing.

        Raises:
            PsError: a part could not close in order; all others have closed.
        """
        with contextlib.ExitStack() as stack:
            for part in self._forget():
                stack.callback(part.close)

    def _forget(self) -> list[Part]:
        """The parts; from then on there are none, and nothing calls this object any more."""
        parts, self._parts = self._parts, []
        self._finalizer.detach()
        atexit.unregister(self.end)
        _live.discard(self)
        return parts

    def _drop(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._end_dropped()
        else:
            threading.Thread(target=self._end_dropped, name="leave").start()

    def _end_dropped(self) -> None:
        try:
            self.end()
        except PsError as error:
            log.warning("worker %s was dropped, and the last step of its model is not complete: %s", self.name, error)

    def before_fork(self) -> None:
        """Prepare all parts for a fork, in the parent."""
        for part in reversed(self._parts):
            part.before_fork()

    def after_fork_in_child(self) -> None:
        """Abandon all parts, in a forked child."""
        for part in reversed(self._forget()):
            part.after_fork_in_child()


_live: "weakref.WeakSet[Lifetime]" = weakref.WeakSet()
_last_member = ""  # name of the member that this process has made last
_forked_from = ""  # the same of the process that this one was forked from


def _before_fork() -> None:
    for lifetime in list(_live):
        lifetime.before_fork()


def _after_fork_in_child() -> None:
    global _forked_from
    _forked_from = _last_member
    for lifetime in list(_live):
        lifetime.after_fork_in_child()


def check_process() -> None:
    """Check that a member may be made in this process.

    Raises:
        PsError: the process was forked from one that had made a member, also one that was closed: gRPC had threads that
            are not here, and a call may hang without them whatever its deadline.
    """
    if _forked_from:
        raise PsError(
            f"this process was forked from that of worker {_forked_from!r}, so no connection works here: start it with "
            "spawn, not with fork, or before the parent makes its optimizer"
        )


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def weakly(method: Callable[P, Any]) -> Callable[P, Any]:
    """A function that calls a bound method as long as its object is there, without keeping it; then it returns None."""
    found = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        method = found()
        return None if method is None else method(*args, **kwargs)

    return call


def immortalise(*objects: object) -> None:
    """Keep objects until the process has ended, so that no destructor of theirs runs."""
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
