"""A whole server without its sockets: every part of a shard as ``ps-serve`` composes it, on an event loop of its own.

    Server.call(method, bytes) -----> Servicer: boundary, job, core, engine ----> reply, or the PsError of a refusal
    Server.open(frames) ------------> Exchange of one worker: Link.send(bytes), Link.taken

Threads are left out: what the apply threads would do is done at once, so a run repeats bit for bit. Whatever raises
what is no ``PsError``, on any path, is in ``Server.bugs``.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from torch_ps.common.errors import PsError
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import unpack_all
from torch_ps.ps.core.effects import Apply, Effect
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.parameter_store import CPU
from torch_ps.ps.observability import bug_reports
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.server import server as root
from torch_ps.ps.server.servicer import Servicer
from torch_ps.ps.server.shutdown import Shutdown
from torch_ps.ps.transport.grpc_carrier import GrpcCarrier

R = TypeVar("R")

#: Turns of the event loop after which all that can happen without a thread has happened.
TURNS = 12


async def _at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class AtOnce(Executor):
    """Does what it is given before ``submit`` returns."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> "Future[R]":
        done: Future[R] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
            done.set_exception(error)
        return done


class Context:
    """Stands in for the part of gRPC's context that handlers use."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def peer(self) -> str:
        return "memory:0"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float | None:
        return None

    async def write(self, message: Any) -> None:
        self.written.append(message)


class Link:
    """One open Exchange: what goes in, and what has come out."""

    def __init__(self, server: "Server") -> None:
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._context = Context()
        self._taken = 0
        self.error: PsError | None = None
        self.task = asyncio.ensure_future(server.watch(self._serve(server.servicer)))

    async def _serve(self, servicer: Servicer) -> None:
        carrier = GrpcCarrier(self._messages(), self._context)
        try:
            await servicer.exchange(carrier)
        except PsError as error:
            self.error = error
        finally:
            await carrier.close()

    async def _messages(self) -> AsyncIterator[bytes]:
        while (message := await self._inbox.get()) is not None:
            yield message

    @property
    def open(self) -> bool:
        return not self.task.done()

    def send(self, message: bytes | None) -> None:
        """Send one message; None ends the stream."""
        self._inbox.put_nowait(message)

    def take(self) -> list[pb.DownHeader]:
        """Headers that have come since the last call."""
        new, self._taken = self._context.written[self._taken :], len(self._context.written)
        return [header for message in new for header, _ in unpack_all(message, pb.DownHeader)]


class BugReports(logging.Handler):
    """Bugs that the server has reported, and not ended by."""

    def __init__(self, found: list[BaseException]) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("bug %d") and record.exc_info and record.exc_info[1] is not None:
            self._found.append(record.exc_info[1])


class Server:
    """One shard of a job. Make it within its running event loop.

    Args:
        config: Its options; ``listen`` and ``metrics`` are not used.

    Attributes:
        bugs: Exceptions that are no refusals.
        reported: Bugs that the server has reported, having contained them.
        applied: Every decision to apply something, in order.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.metrics, self.shutdown = Metrics(), Shutdown(0)
        self.incarnation = 7
        settings = root._settings(config, CPU)
        place = root._Place(
            config,
            settings,
            Incarnation(self.incarnation, settings.index, settings.num_shards, lease=settings.lease),
            0,
            range(2, 4),
            None,
            None,
            Access(None, None, False),
        )
        self.parts = root._compose(place, AtOnce(), self.metrics, Address("127.0.0.1", 1), self.shutdown)
        if self.parts.checkpointer is not None:
            self.parts.checkpointer._on_thread = _at_once  # type: ignore[method-assign, assignment]
        self.servicer = Servicer(self.parts, port=1, max_model=1 << 20)
        self.servicer._joins.take = lambda host, now: None  # type: ignore[method-assign]  # thousands of joins a minute
        self.bugs: list[BaseException] = []
        self.reported: list[BaseException] = []
        bug_reports._throttle = LogThrottle()  # a run that is repeated has the same reports
        self._reports = BugReports(self.reported)
        logging.getLogger("torch_ps.ps").addHandler(self._reports)
        self.applied: list[Apply] = []
        self._background: set[asyncio.Future[Any]] = set()
        asyncio.get_running_loop().set_exception_handler(self._note)

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.bugs.append(context.get("exception") or RuntimeError(context["message"]))

    @property
    def engine(self) -> Engine | None:
        return self.parts.job.engine

    def see_applied(self) -> None:
        """Note what the engine applies from now on, in ``applied``."""
        engine = self.engine
        if engine is None or getattr(engine.run, "seen", False):
            return
        run = engine.run

        def seen(effects: Any) -> None:
            effects = tuple[Effect](effects)
            self.applied += [effect for effect in effects if isinstance(effect, Apply)]
            run(effects)

        seen.seen = True  # type: ignore[attr-defined]
        engine.run = seen  # type: ignore[method-assign]

    async def watch(self, work: Coroutine[Any, Any, R]) -> R | None:
        """Await ``work``; what is no refusal is a bug."""
        try:
            return await work
        except PsError:
            raise
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            self.bugs.append(error)
            return None

    async def call(self, method: str, message: bytes, *, wait: bool = True) -> Any:
        """Call one method with the bytes of its request, or with those of the one message of its stream.

        Args:
            wait: Whether to return the reply, or the error; else the call goes on in the background.

        Raises:
            PsError: The server refuses.
        """
        servicer = self.servicer

        async def frames() -> AsyncIterator[bytes]:
            yield message

        request = getattr(pb, f"{method}Request", None)
        handler: Any = getattr(servicer, method.lower())
        if method not in ("Seed", "Commit", "Replicate"):
            handler = servicer._read_request(handler, request)
        work = self.watch(handler(frames(), Context()))
        if wait:
            return await work
        task = asyncio.ensure_future(_quiet(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return None

    async def stream(self, method: str, messages: list[bytes]) -> Any:
        """Call one method with the messages of its stream."""

        async def frames() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        return await self.watch(getattr(self.servicer, method.lower())(frames(), Context()))

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Future[Any]":
        """Run something beside the server until ``close``; refusals end it."""
        task = asyncio.ensure_future(_quiet(self.watch(work)))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def settle(self) -> None:
        """Let everything happen that can."""
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def forget(self) -> None:
        """Hear of no more bug reports."""
        logging.getLogger("torch_ps.ps").removeHandler(self._reports)

    async def close(self) -> None:
        """End what is in the background and write the last checkpoint."""
        for task in list(self._background):
            task.cancel()
        await self.settle()
        checkpointer = self.parts.checkpointer
        if checkpointer is None:
            return
        if self.parts.job.settings.num_shards == 1:  # others would be waited for
            await self.watch(checkpointer.finish())
        checkpointer.ownership.release()  # ends the thread that renews the claim


async def _quiet(work: Coroutine[Any, Any, Any]) -> Any:
    with contextlib.suppress(PsError):
        return await work
