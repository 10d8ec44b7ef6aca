"""Blocking calls on threads that nobody waits for at the end of the process.

``asyncio.to_thread`` and executors join their threads when the process ends. A disk or a store that does not answer
would keep a process that was told to end for ever.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar, TypeVarTuple, Unpack

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def in_daemon_thread(
    function: Callable[[Unpack[Arguments]], Result], *arguments: *Arguments, name: str
) -> Future[Result]:
    """Call a function that blocks; who stops waiting for the result leaves the call to itself.

    Args:
        name: name of the thread.
    """
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def to_daemon_thread(
    function: Callable[[Unpack[Arguments]], Result], *arguments: *Arguments, name: str
) -> Result:
    """Await the result of ``in_daemon_thread``; who is cancelled leaves the call to itself."""
    return await asyncio.wrap_future(in_daemon_thread(function, *arguments, name=name))
