"""Several workers in one test process: a thread each, every wait with a deadline, no error lost."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


def spawn(function: Callable[[], Result]) -> "Future[Result]":
    """Run ``function`` on a thread of its own, which does not keep the process alive."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - handed on to whoever asks for the result
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def at_once(*functions: Callable[[], Result], seconds: float = 120.0) -> list[Result]:
    """Run all functions at the same time; their results in order, or the first error."""
    deadline = time.monotonic() + seconds
    futures = [spawn(function) for function in functions]
    return [future.result(max(deadline - time.monotonic(), 0)) for future in futures]
