"""Who is connected: what opens a stream, keeps a lease and shares memory with a worker.

    Exchange: Hello --open()--> Stream --heard()--> lease renewed --close()--> its answers are forgotten
    Share --share()--> the memory of a worker on this host is mapped

Rules of this file
  1. Decides nothing about steps or members: the core does. It is asked before anything changes.
"""

import itertools
import time

from torch_ps.common import codecs
from torch_ps.common.arena import Offer
from torch_ps.common.errors import NoSharedMemory, UnknownWorker
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.ps.job.job import Job
from torch_ps.ps.transport.streams import Stream


class Connections:
    """Those of one shard. All methods run on the event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._observers = itertools.count(1)

    async def open(self, hello: pb.Hello) -> Stream:
        """Check the first frame of an Exchange.

        Raises:
            UnknownCodec: for pulls.
            UnknownWorker: not in the roster.
            NotInitialised: an observer came before the parameters.
        """
        codec = codecs.codec(hello.pull_codec or "none")
        if not hello.worker:
            self._job.working()
            stream = Stream(None, next(self._observers), codec)
        else:
            await self._job.until_member(hello.worker, hello.session)
            stream = Stream(hello.worker, hello.session, codec)
            if codec.coarse and hello.worker in self._job.copies:
                stream.copies = self._job.copies.pop(hello.worker)
        before = self._job.streams.get(stream.worker, stream.session)
        if before is not None and self._job.engine is not None:
            self._job.engine.disconnected(before)
        self._job.streams.add(stream)
        if stream.worker is not None:
            for frame in self._job.seat_driver.greeting():
                stream.outbox.put_nowait(frame)
        return stream

    def close(self, stream: Stream) -> None:
        if self._job.streams.remove(stream) and self._job.engine is not None:
            self._job.engine.disconnected(stream)

    def heard(self, worker: str | None, session: int) -> None:
        """Traffic renews the lease; None: that of an observer, who has none.

        Raises:
            UnknownWorker: the lease has run out before, and the standby, if there is one, knows that too.
        """
        if self._job.membership is None or worker is None:
            return
        try:
            self._job.membership.renew(worker, session, time.monotonic())
        except UnknownWorker:
            # What waits for the standby is said to nobody; and whether to go on without that one is for workers to say.
            if not self._job.is_member(worker, session):
                raise

    async def share(self, worker: str, session: int, gradients: Offer, answers: Offer, *, dialled: int) -> Offer:
        """Map the memory of a worker on this host; answers with that of the parameters.

        Args:
            dialled: port at which the worker has found this shard, 0 if that is not to matter.

        Raises:
            UnknownWorker: not in the roster.
            NotInitialised: the parameters are not there yet.
            NoSharedMemory: it cannot be mapped; says why.
        """
        await self._job.until_member(worker, session)
        if dialled not in (0, self._job.port):
            raise NoSharedMemory(f"something stands between port {dialled} and this server, so all goes through it")
        return self._job.working().arenas.admit(worker, session, gradients, answers)
