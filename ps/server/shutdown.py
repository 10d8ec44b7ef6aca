"""When and why a server process ends, and what it tells its workers then."""

import asyncio
import logging

from torch_ps.common.ending_signals import ending_signals, ignore_ending_signals
from torch_ps.common.errors import NotServing, PsError, Restarted, ServerStopped

log = logging.getLogger("torch_ps.ps")


class Shutdown:
    """Set once by a signal or by the first failure.

    Args:
        shard: Index of the shard that the process serves.

    Attributes:
        failure: The first error after which the shard could not go on; None after a signal.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._event = asyncio.Event()
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """End the process because of ``error``."""
        if isinstance(error, PsError):
            log.error("shard %d fails: %s", self._shard, error)
        else:
            log.error("shard %d fails", self._shard, exc_info=error)
        self.failure = self.failure or error
        self._event.set()

    def listen_to_signals(self) -> None:
        """End the process at SIGTERM, SIGINT or, without nohup, SIGHUP."""
        loop = asyncio.get_running_loop()
        for number in ending_signals():
            loop.add_signal_handler(number, self._event.set)

    def ignore_signals(self) -> None:
        """Let no further signal end the process: it has done all that it had to."""
        loop = asyncio.get_running_loop()
        for number in ending_signals():
            loop.remove_signal_handler(number)
        ignore_ending_signals()

    def watch(self, task: asyncio.Task[None]) -> None:
        """End the process if ``task`` fails."""
        task.add_done_callback(self._check)

    async def wait(self) -> None:
        """Wait until the process is to end."""
        await self._event.wait()

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)


def last_word(shard: int, failure: BaseException | None, *, standby: bool = False) -> PsError:
    """The error that the workers of a shard get when it ends.

    Args:
        standby: Another server goes on in its place.
    """
    if isinstance(failure, NotServing | Restarted):  # another server serves, or this one may be back soon
        return failure
    if standby:
        return NotServing(f"shard {shard} has ended here; its other server goes on")
    if failure is None:
        return ServerStopped(f"shard {shard} was stopped; start the job again")
    return ServerStopped(f"shard {shard} failed: {text_of(failure)}")


def text_of(error: BaseException) -> str:
    """One line about an error: its message if it is one of ours, else with its class."""
    return str(error) if isinstance(error, PsError) else repr(error)
