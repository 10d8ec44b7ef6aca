"""Opens the stream of a worker, renews its lease and shares memory with it.

    Exchange: Hello --open()--> Stream --renew()--> lease renewed --close()--> its answers are dropped
    Share --share()--> the memory of a worker on this host is mapped

Rules of this file
  1. It decides nothing about steps or members: the core does, and is asked before anything changes.
"""

import itertools
import time

from torch_ps.common import codecs
from torch_ps.common.arena import Offer, offer_from_proto
from torch_ps.common.errors import NoSharedMemory, UnknownWorker
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.seat_driver import SeatDriver
from torch_ps.ps.transport.streams import Stream


class Connections:
    """The connections of one shard. All methods run on the event loop.

    Args:
        port: Port at which this shard listens.
    """

    def __init__(self, job: Job, driver: SeatDriver, port: int) -> None:
        self._job, self._driver, self._port = job, driver, port
        self._observers = itertools.count(1)

    async def open(self, hello: pb.Hello) -> Stream:
        """Open the stream that the first frame of an Exchange asks for.

        Raises:
            UnknownCodec: The codec for pulls is not known here.
            UnknownWorker: The worker is not in the roster.
            NotInitialised: An observer came before the parameters.
        """
        codec = codecs.codec(hello.pull_codec or "none")
        if not hello.worker:
            self._job.working()
            stream = Stream(None, next(self._observers), codec)
        else:
            await self._job.until_member(hello.worker, hello.session, hello.secret)
            stream = Stream(hello.worker, hello.session, codec)
            if codec.coarse and hello.worker in self._job.copies:
                stream.copies = self._job.copies.pop(hello.worker)
        before = self._job.streams.get(stream.worker, stream.session)
        if before is not None and self._job.engine is not None:
            self._job.engine.disconnected(before)
        self._job.streams.add(stream)
        if stream.worker is not None:
            for frame in self._driver.greeting():
                stream.outbox.put_nowait(frame)
        return stream

    def find(self, worker: str, session: int) -> Stream | None:
        """The open stream of a worker; None: it has none."""
        return self._job.streams.get(worker, session) if worker else None

    def close(self, stream: Stream) -> None:
        """Forget a stream that has ended."""
        if self._job.streams.remove(stream) and self._job.engine is not None:
            self._job.engine.disconnected(stream)

    def renew(self, worker: str | None, session: int) -> None:
        """Renew the lease of a worker that something has come from; ``worker`` is None for an observer, who has none.

        Raises:
            UnknownWorker: The lease has run out before, and the standby, if there is one, knows that too.
        """
        if self._job.membership is None or worker is None:
            return
        try:
            self._job.membership.renew(worker, session, time.monotonic())
        except UnknownWorker:
            # An eviction that waits for the standby is told to nobody; workers decide whether to go on without it.
            if not self._job.is_member(worker, session):
                raise

    async def share(self, request: pb.ShareRequest) -> Offer:
        """Map the memory of a worker on this host. Returns the offer of this shard's parameters.

        Raises:
            UnknownWorker: The worker is not in the roster, or the secret is not its own.
            NotInitialised: The parameters are not there yet.
            NoSharedMemory: The memory cannot be mapped; the message says why.
        """
        await self._job.until_member(request.worker, request.session, request.secret)
        if request.dialled_port not in (0, self._port):
            port = request.dialled_port
            raise NoSharedMemory(f"something stands between port {port} and this server, so all goes through it")
        offers = offer_from_proto(request.gradients), offer_from_proto(request.answers)
        return self._job.working().arenas.admit(request.worker, request.session, *offers)
