"""Graceful shutdown: on SIGTERM or SIGHUP a worker finishes its step, leaves the job and ends with exit code 0.

    SIGTERM --in a step--> the step goes on; at its end: leave, exit 0      samples that are not pushed go to others
            --waiting for samples or for the first workers--> leave, exit 0
            --no optimizer yet, again, or no end of the step in 20 s--> exit 143, unwinding what is open
    SIGHUP  the same, as a terminal sends it when it closes; exit 129 where SIGTERM gives 143

A step lasts from one return of ``optimizer.step()`` to the next. The exit code is 0 because nothing is lost and nothing
went wrong: Slurm calls the task COMPLETED, Kubernetes the Pod Succeeded, ``ps-run`` goes on with the other workers.

Rules of this file
  1. A handler of the script's own is never replaced, and SIGHUP stays ignored where ``nohup`` has it ignored.
  2. The handler sets flags and starts threads; what takes time happens in the training loop. Another thread ends a
     wait: an exception in the middle of a call would leave gRPC with locks that nobody releases.
  3. A forked child is no worker: both signals end it at once, as without this module.
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

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
#: Seconds in which the step in progress has to end; Kubernetes and Slurm kill 30 s after SIGTERM.
STEP_SECONDS = 20.0

_attached: "weakref.WeakSet[object]" = weakref.WeakSet()
#: Set by the signal: the worker is to leave at the end of its step.
requested = threading.Event()
_number = int(signal.SIGTERM)  # of the signal that has set it
_waits: list[Callable[[], object]] = []  # each ends a wait of the main thread outside of a step


def on_signal(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM or SIGHUP."""
    global _number
    if requested.is_set() or not _attached:
        sys.exit(128 + number)
    _number = number
    requested.set()
    for end in _waits:
        threading.Thread(target=end, name="drain", daemon=True).start()
    timer = threading.Timer(STEP_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def attach(optimizer: object) -> None:
    """Let the signals wait for the steps of ``optimizer``; installs the handler unless the script has its own."""
    _attached.add(optimizer)
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, on_signal)


def detach(optimizer: object) -> None:
    """Forget an optimizer that has left the job."""
    _attached.discard(optimizer)


def leave_and_exit(worker: str, leave: Callable[[], None]) -> None:
    """Leave the job and end the process, as a signal has ``requested``. Call it between two steps.

    Args:
        worker: name of the worker, for the log.
        leave: leaves the job.
    """
    name = signal.Signals(_number).name
    log.info("%s: worker %s has finished its step and leaves the job", name, worker)
    leave()
    sys.exit(0)


def _handled() -> set[signal.Signals]:
    return {number for number in SIGNALS if signal.getsignal(number) is on_signal}


def _before_fork() -> None:
    if handled := _handled():  # a child that gets one too early would lose it
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)


def _after_fork() -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    global requested
    requested = threading.Event()  # another thread may have held the lock of the former one
    _attached.clear()
    _waits.clear()
    for number in _handled():
        signal.signal(number, signal.SIG_DFL)
    _after_fork()


_forking = threading.local()  # ``mask``: signals that a thread blocks, but for its fork; several may fork at once
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


@contextlib.contextmanager
def interruptible(end: Callable[[], object]) -> Iterator[None]:
    """Around a wait outside of a step: the signal calls ``end``, on another thread, which has to make the wait fail."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _waits.append(end)
    try:
        if requested.is_set():
            end()
        yield
    finally:
        _waits.remove(end)
