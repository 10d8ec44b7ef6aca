"""Frames to all shards and their answers, over streams that are opened again when they break.

    send(bucket, frame) --> kept --> stream of its shard --> server
    answered(bucket)    <-- dropped <-- on_answer <-- server

Rules of this file
  1. What is sent is bytes and buckets are numbers; what they mean is the session's business.
  2. A frame that is not answered yet is kept as it was sent. When a connection breaks it is sent again on the next one;
     the servers apply it once.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from torch_ps.common.errors import NotServing, PsError, Restarted, UnknownWorker, Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import unpack_all
from torch_ps.worker.transport.grpc_stream import GrpcStream
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers
from torch_ps.worker.transport.unix_stream import UnixStream

log = logging.getLogger("torch_ps.worker")

#: Seconds between two tries to open a stream again.
RETRY_SECONDS = 0.2
#: What ends a stream of a server that is gone, or does not serve any more; another may be found.
GONE = Unreachable, NotServing
#: What another try to open a stream would not change.
FINAL = (UnknownWorker, Restarted)


class ShardStreams:
    """The open streams of one session, one per shard.

    Args:
        links: to all shards, shard 0 first.
        hello: first frame of every stream.
        shard_of: shard of each bucket.
        lease: seconds in which a stream that broke has to be open again, more where a standby may take over.
        on_answer: called on a reader thread with the shard and a frame of it; calls ``answered``.
        on_back: called with a shard that answers again and what it says it is, before its stream is opened; a
            ``PsError`` means: not yet, unless it is one of ``FINAL``.
        voters: find the server of each shard that serves, and answer what a server asks.
    """

    def __init__(
        self,
        links: Sequence[Link],
        hello: bytes,
        shard_of: Sequence[int],
        lease: float,
        on_answer: Callable[[int, pb.DownHeader, memoryview], None],
        on_back: Callable[[int, pb.JobDescription], None],
        shards: Sequence[ShardServers],
    ) -> None:
        self._links, self._hello, self._shard_of, self._lease = links, hello, shard_of, lease
        self._on_answer, self._on_back, self._shards = on_answer, on_back, shards
        #: Held while anything here changes; what answers say may be kept under it too.
        self.changed = threading.Condition()
        self._stopping = threading.Event()
        self._error: PsError | None = None
        self._streams: dict[int, GrpcStream | UnixStream] = {}
        self._opened = [0] * len(links)  # streams so far; the number names the latest
        self._opening: set[int] = set()  # shards whose stream is about to be there
        self._unanswered: dict[int, bytes] = {}
        self._heard = [0.0] * len(links)  # when the last message came, on time.monotonic()
        self._choosy = 0  # threads that wait for some buckets only
        for shard in range(len(links)):
            self._open(shard)

    def send(self, bucket: int, frame: bytes) -> None:
        """Send a push or a pull of one bucket; ``wait`` waits for its answer."""
        shard, missing = self._shard_of[bucket], False
        with self.changed:
            if self._error is not None:
                return  # wait() will raise it
            self._unanswered[bucket] = frame
            stream = self._streams.get(shard)
            if stream is None and shard not in self._opening:
                missing = True
                self._opening.add(shard)
        if stream is not None:
            stream.send(frame)
        elif missing:
            self._open(shard)

    def send_unkept(self, shard: int, frame: bytes) -> None:
        """Send a frame that nothing answers, if the stream is open."""
        stream = self._streams.get(shard)
        if stream is not None:
            stream.send(frame)

    def has(self, shard: int) -> bool:
        """Whether the stream to a shard is open."""
        return shard in self._streams

    def heard(self, shard: int) -> float:
        """When the last message of a shard came, on ``time.monotonic()``."""
        return self._heard[shard]

    def give_up(self, shard: int, error: PsError) -> None:
        """The server of a shard does not answer: have its stream opened again where one serves."""
        stream = self._streams.get(shard)
        if stream is not None:
            stream.fail(error)

    def unanswered(self, bucket: int) -> bytes | None:
        """The frame of this bucket that waits for its answer."""
        return self._unanswered.get(bucket)

    def keep(self, bucket: int, frame: bytes) -> None:
        """Send this frame in the place of the unanswered one, should it have to be sent again."""
        with self.changed:
            if bucket in self._unanswered:
                self._unanswered[bucket] = frame

    def reset(self, hello: bytes) -> None:
        """Forget all that is under way: the streams are opened anew, and no answer of before is taken any more.

        Args:
            hello: first frame of every stream from now on.
        """
        with self.changed:
            self._hello = hello
            streams = tuple(self._streams.values())
            self._streams.clear()
            self._opened = [number + 1 for number in self._opened]
            self._unanswered.clear()
            self._error = None
        for stream in streams:
            stream.close()
        for shard in range(len(self._links)):
            self._open(shard)

    def answered(self, bucket: int) -> None:
        """The answer has been taken; to be called with ``changed`` held."""
        self._unanswered.pop(bucket, None)
        if self._choosy or not self._unanswered:
            self.changed.notify_all()

    @property
    def waiting(self) -> bool:
        """Whether anything is not answered yet."""
        return bool(self._unanswered)

    def wait(self, seconds: float, buckets: Collection[int] | None = None) -> bool:
        """Wait until everything is answered; False: it is not after ``seconds``. To be called with ``changed`` held.

        Args:
            buckets: wait for these only.

        Raises:
            PsError: what ended a stream. Nothing waits for an answer then.
        """
        self._choosy += buckets is not None
        try:
            done = self.changed.wait_for(lambda: self._error or not self._open_of(buckets), seconds)
        finally:
            self._choosy -= buckets is not None
        if self._error is not None:
            error, self._error = self._error, None
            self._unanswered.clear()
            raise error
        return bool(done)

    def _open_of(self, buckets: Collection[int] | None) -> bool:
        if buckets is None:
            return bool(self._unanswered)
        return any(bucket in self._unanswered for bucket in buckets)

    def pause(self, seconds: float) -> bool:
        """Wait ``seconds``; True at once when the exchange is closed."""
        return self._stopping.wait(seconds)

    def close(self) -> None:
        """End all streams; frames that were sent are delivered first."""
        self._stopping.set()
        with self.changed:
            streams = tuple(self._streams.values())
            self._streams.clear()
            self._opened = [number + 1 for number in self._opened]  # what still comes is nobody's
            self._unanswered.clear()
        for stream in streams:
            stream.close()

    # -------------------------------------------------------------- streams

    def _open(self, shard: int, latest: int | None = None) -> None:
        """Open the stream to one shard and send again what it has not answered.

        Args:
            latest: only if this is still the number of the latest stream.
        """
        with self.changed:  # so that the stream cannot end before it is known
            if latest not in (None, self._opened[shard]):
                return
            self._opened[shard] = number = self._opened[shard] + 1
            stream = self._links[shard].open(
                lambda message: self._received(shard, number, message),
                lambda error: self._ended(shard, number, error),
            )
            stream.send(self._hello)
            self._streams[shard] = stream
            self._opening.discard(shard)
            again = [frame for bucket, frame in self._unanswered.items() if self._shard_of[bucket] == shard]
        for frame in again:
            stream.send(frame)

    def _received(self, shard: int, number: int, message: bytes) -> None:
        if number != self._opened[shard]:
            return  # of a stream that was given up
        self._heard[shard] = time.monotonic()
        for header, payload in unpack_all(message, pb.DownHeader):
            if not header.HasField("ballot"):
                self._on_answer(shard, header, payload)
            elif (frame := self._shards[shard].frame(header.ballot)) is not None:
                self.send_unkept(shard, frame)

    def _ended(self, shard: int, number: int, error: PsError) -> None:
        """On the reader thread: the stream of one shard broke. It is opened again also while nobody waits for it."""
        with self.changed:
            if number != self._opened[shard]:
                return  # another one has taken its place
            self._streams.pop(shard, None)
            if isinstance(error, GONE):
                self._opening.add(shard)
        if isinstance(error, GONE):
            found = self._reopen(shard, number, error)
            if found is None:
                return
            error = found
        with self.changed:
            if number != self._opened[shard]:
                return
            self._opening.discard(shard)
            if self._error is None and not self._stopping.is_set():
                self._error = error
                self.changed.notify_all()

    def _reopen(self, shard: int, number: int, error: PsError) -> PsError | None:
        """None: the stream is open again, or a later one is; else why it is not, ``error`` if nothing answers."""
        link, deadline = self._links[shard], time.monotonic() + self._shards[shard].patience(self._lease)
        log.warning("lost the connection to %s; trying again", link.address)
        late = False  # one try begins after the deadline: this process may have been stopped until then
        pause = 0.0  # the first time at once: a standby may be there
        while not late and not self._stopping.wait(pause):
            pause = RETRY_SECONDS
            if number != self._opened[shard]:
                return None
            late = time.monotonic() > deadline
            try:
                if (now := self._shards[shard].look()) is None:
                    continue
                self._on_back(shard, now)
            except FINAL as final:
                return final
            except PsError:
                continue
            self._open(shard, number)
            link.interrupt()  # what was asked of the server of before
            return None
        return error
