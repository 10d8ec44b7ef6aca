"""SIGTERM drains a worker: it finishes its step, leaves the job and ends with exit code 0.

    SIGTERM --in a step--> the step goes on; at its end: leave, exit 0      samples that are not pushed go to others
            --waiting for samples or for the first workers--> leave, exit 0
            --no optimizer yet, again, or no end of the step in 20 s--> exit 143, unwinding what is open

A step is what lies between two returns of ``optimizer.step()``. Exit code 0, because nothing is lost and nothing went
wrong: Slurm calls the task COMPLETED, Kubernetes a Pod Succeeded, ``ps-run`` goes on with the other workers.

Rules of this file
  1. A handler of the script's own is never replaced.
  2. Only flags are set in the handler; what takes time happens where the training loop is. A wait is ended from another
     thread: an exception in the middle of a call would leave gRPC with locks that nobody gives back.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

log = logging.getLogger("torch_ps.worker")

#: Seconds that the step in progress gets; Kubernetes and Slurm kill 30 s after SIGTERM.
STEP_SECONDS = 20.0

_attached: "weakref.WeakSet[object]" = weakref.WeakSet()
_asked = threading.Event()
_waits: list[Callable[[], object]] = []  # how to end what the main thread waits for outside of a step


def on_sigterm(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM."""
    if _asked.is_set() or not _attached:
        sys.exit(128 + number)
    _asked.set()
    for end in _waits:
        threading.Thread(target=end, name="drain", daemon=True).start()
    timer = threading.Timer(STEP_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def attach(optimizer: object) -> None:
    """From now on this process has steps to finish; takes SIGTERM where nobody has."""
    _attached.add(optimizer)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, on_sigterm)


def detach(optimizer: object) -> None:
    """It has left the job."""
    _attached.discard(optimizer)


def finish(worker: str, leave: Callable[[], None]) -> None:
    """Between two steps: leave the job and the process, if SIGTERM has asked for it."""
    if _asked.is_set():
        log.info("SIGTERM: worker %s has finished its step and leaves the job", worker)
        leave()
        sys.exit(0)


@contextlib.contextmanager
def waiting(end: Callable[[], object]) -> Iterator[None]:
    """Around a wait outside of a step. SIGTERM calls ``end``, on another thread, upon which the wait has to fail."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _waits.append(end)
    try:
        if _asked.is_set():
            end()
        yield
    finally:
        _waits.remove(end)
