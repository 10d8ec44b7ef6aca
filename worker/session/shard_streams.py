"""The streams to all shards: keeps each frame until it is answered, and sends it again when a stream breaks.

    send(bucket, frame) --> kept --> stream of its shard --> server
    send_ahead(bucket, frame) --> kept beside it; the push that names it overtakes what still waits to leave, and a copy
                                  of it overtakes what waits in buffers, over another connection
    mark_answered(bucket) --> dropped <-- on_message <-- server

Rules of this file
  1. Frames and messages are bytes, split or not, and buckets are numbers; the session knows what they mean.
  2. A frame that is not answered yet is kept as it was sent. When a stream breaks it is sent again on the next one; the
     servers apply it once.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from torch_ps.common.daemon_thread import in_daemon_thread
from torch_ps.common.errors import NotServing, PsError, Restarted, UnknownWorker, Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import MAX_FRAMES, Frame, Split
from torch_ps.worker.transport.call_retry import RETRY_SECONDS
from torch_ps.worker.transport.link import Dialled
from torch_ps.worker.transport.shard_servers import ShardServers
from torch_ps.worker.transport.stream import EndedHere, Stream

log = logging.getLogger("torch_ps.worker")

#: Gradients sent ahead that may wait in the buffers of a connection, in bytes. Fewer do not hold a push up for long.
BUFFERED_BYTES = 1 << 18
#: Errors that end the stream of a server that is gone, or does not serve any more; another one may be found.
GONE = Unreachable, NotServing
#: Errors that another try to open a stream would not change.
FINAL = (UnknownWorker, Restarted)


class ShardStreams:
    """The streams of one session, one per shard, once ``open`` was called. Methods may be called on any thread.

    Args:
        shards: servers of every shard, shard 0 first.
        hello: first frame of every stream.
        shard_of: shard of each bucket.
        lease: seconds in which a broken stream has to be open again; more where a standby may take over.
        on_message: function that takes the shard and a message of it, on the reader thread of the shard or in ``read``;
            it calls ``mark_answered`` for each answer in the message, and returns whether answers are to be taken even
            while no thread waits for them.
        on_back: function that takes a shard that answers again and the description that its server gives of the job,
            before the stream is opened. A ``PsError`` that it raises means "not yet", unless it is one of ``FINAL``.
        place: function that takes a shard, the head of a message of it and the bytes of its payload, and returns where
            the payload is to be received, if anywhere.

    Attributes:
        changed: held while anything here changes; what the session keeps of the answers changes under it, too.
    """

    def __init__(
        self,
        shards: Sequence[ShardServers],
        hello: bytes,
        shard_of: Sequence[int],
        lease: float,
        on_message: Callable[[int, Frame], bool],
        on_back: Callable[[int, pb.JobDescription], None],
        place: Callable[[int, bytes, int], memoryview | None],
    ) -> None:
        self._shards, self._hello, self._shard_of, self._lease = shards, hello, shard_of, lease
        self._on_message, self._on_back, self._place = on_message, on_back, place
        self._lock = threading.RLock()  # Ctrl-C never leaves it half taken, as it does a Condition
        self.changed = threading.Condition(self._lock)
        self._stopping = threading.Event()
        self._error: PsError | None = None
        self._streams: dict[int, Stream] = {}
        self._opened = [0] * len(shards)  # streams opened so far; the number names the latest
        self._opening: set[int] = set()  # shards whose stream is being opened
        self._unanswered: dict[int, Frame] = {}
        self._num_unanswered = [0] * len(shards)
        self._ahead: dict[int, Frame] = {}  # gradients sent ahead of pushes that are not answered yet, or not made
        self._undecided: list[set[int]] = [set() for _ in shards]  # buckets sent ahead, while no push has come
        self._copies: list[list[bytes]] = [[] for _ in shards]  # pushes that name them, until the last one is decided
        self._ahead_bytes = [0] * len(shards)  # sent ahead since the last push
        self._heard = [0.0] * len(shards)  # when the last message came, on time.monotonic()
        self._awaited: list[set[int]] = []  # for each wait for some buckets: those not answered yet

    def open(self) -> None:
        """Open the streams. From then on ``on_message`` and ``on_back`` are called, so the caller has to be ready."""
        dialling = [in_daemon_thread(each.link.dial, name=f"dial {each.link.address}") for each in self._shards]
        for shard, dialled in enumerate(dialling):  # at once, for each may take two seconds
            self._open(shard, dialled=dialled.result())

    def send(self, bucket: int, frame: Frame, *, overtake: bool = False) -> None:
        """Send a frame of one bucket; ``wait`` waits for its answer. An error comes out there, too.

        Args:
            bucket: bucket of the frame.
            frame: frame to send.
            overtake: whether the frame passes those that still wait to leave.
        """
        shard = self._shard_of[bucket]
        try:
            self._send(shard, bucket, frame, overtake=overtake)
        except BaseException:  # Ctrl-C: whether the frame has left is not known, so it is sent again on another stream
            self.fail_stream(shard, EndedHere("sending to it was interrupted"))
            raise

    def _send(self, shard: int, bucket: int, frame: Frame, *, overtake: bool) -> None:
        missing = False
        with self._lock:
            if self._error is not None:
                return  # wait() will raise it
            self._num_unanswered[shard] += bucket not in self._unanswered
            self._unanswered[bucket] = frame
            stream = self._streams.get(shard)
            if stream is None and shard not in self._opening:
                missing = True
                self._opening.add(shard)
        if stream is not None:
            stream.send(frame, overtake=overtake)
            self._decide(bucket, frame if overtake and isinstance(frame, bytes) else None)
        elif missing:
            try:
                self._open(shard)
            except BaseException:  # nobody opens it now, so nothing waits for it
                with self._lock:
                    self._opening.discard(shard)
                    if shard not in self._streams:
                        self.mark_answered(bucket, keep_ahead=True)
                raise

    def send_ahead(self, bucket: int, frame: Frame) -> None:
        """Send a gradient ahead of its push. It is sent again with the push if the stream breaks before the answer."""
        with self._lock:
            if self._error is not None:
                return
            shard = self._shard_of[bucket]
            self._ahead[bucket] = frame
            self._undecided[shard].add(bucket)
            self._ahead_bytes[shard] += len(frame)
            stream = self._streams.get(shard)
        if stream is not None:
            stream.send(frame)

    def ahead(self, bucket: int) -> Frame | None:
        """The frame that was sent ahead for a bucket; None if there is none."""
        return self._ahead.get(bucket)

    def drop_ahead(self, bucket: int) -> None:
        """Forget what was sent ahead for a bucket: no push names it, and the server replaces or drops it."""
        with self._lock:
            self._ahead.pop(bucket, None)
        self._decide(bucket, None)

    def _decide(self, bucket: int, push: bytes | None) -> None:
        """Note the push of a bucket that was sent ahead, if it names that. The last one of a shard sends the copies."""
        shard = self._shard_of[bucket]
        with self._lock:
            if push is not None:
                self._copies[shard].append(push)
            self._undecided[shard].discard(bucket)
            if self._undecided[shard]:
                return
            copies, self._copies[shard] = self._copies[shard], []
            size, self._ahead_bytes[shard] = self._ahead_bytes[shard], 0
        if copies and size >= BUFFERED_BYTES:
            self._shards[shard].link.commit(b"".join((self._hello, *copies[: MAX_FRAMES - 1])))

    def send_unkept(self, shard: int, frame: bytes) -> None:
        """Send a frame that nothing answers, if the stream is open."""
        with self._lock:  # what is answered may have come before the opened stream was noted
            stream = self._streams.get(shard)
        if stream is not None:
            stream.send(frame)

    def is_open(self, shard: int) -> bool:
        """Whether the stream to a shard is open."""
        return shard in self._streams

    def last_heard(self, shard: int) -> float:
        """When the last message of a shard came, on ``time.monotonic()``; 0 before the first."""
        return self._heard[shard]

    def fail_stream(self, shard: int, error: PsError) -> None:
        """End the stream of a server that does not answer, so that it is opened again where one serves."""
        stream = self._streams.get(shard)
        if stream is not None:
            stream.fail(error)

    def unanswered(self, bucket: int) -> Frame | None:
        """The frame of a bucket that waits for its answer; None if there is none."""
        return self._unanswered.get(bucket)

    def replace_unanswered(self, bucket: int, frame: Frame) -> None:
        """Keep ``frame`` in place of the unanswered one of a bucket, to be sent if the stream is opened again."""
        with self._lock:
            if bucket in self._unanswered:
                self._unanswered[bucket] = frame

    def own_unanswered(self) -> None:
        """Keep copies of the payloads that are not answered: their memory may change once this has returned.

        A stream that may still send from that memory is ended, and opened again, where the copies are sent.
        """
        with self._lock:
            for bucket, frame in self._unanswered.items():
                if isinstance(frame, Split):
                    self._unanswered[bucket] = Split(frame.head, (memoryview(b"".join(frame.payload)),))
            streams = tuple(self._streams.values())
        for stream in streams:
            if stream.sending:
                stream.fail(EndedHere("its step was given up while gradients were being sent"))

    def reset(self, hello: bytes) -> None:
        """Forget everything under way: open new streams, and ignore every answer to what was sent before.

        Args:
            hello: first frame of every stream from now on.
        """
        with self._lock:
            self._hello = hello
            streams = tuple(self._streams.values())
            self._streams.clear()
            self._opening.clear()  # by threads that see the new numbers
            self._opened = [number + 1 for number in self._opened]
            self._forget_unanswered()
            self._error = None
        for stream in streams:
            stream.close()
        self.open()

    def mark_answered(self, bucket: int, *, keep_ahead: bool = False) -> None:
        """Drop the kept frame of a bucket, whose answer has been taken. The caller holds ``changed``.

        Args:
            bucket: bucket of the frame.
            keep_ahead: whether a push may still name what was sent ahead.
        """
        if self._unanswered.pop(bucket, None) is not None:
            self._num_unanswered[self._shard_of[bucket]] -= 1
        if not keep_ahead:
            self._ahead.pop(bucket, None)
        done = not self._unanswered
        for awaited in self._awaited:
            awaited.discard(bucket)
            done = done or not awaited
        if done:
            self.changed.notify_all()

    @property
    def waiting(self) -> bool:
        """Whether anything is not answered yet."""
        return bool(self._unanswered)

    def wait(self, seconds: float, buckets: Collection[int] | None = None) -> bool:
        """Wait until every frame is answered. The caller holds ``changed``.

        Args:
            seconds: longest time to wait.
            buckets: buckets to wait for; None: all.

        Returns:
            False if some frames are still unanswered after ``seconds``.

        Raises:
            PsError: the error that ended a stream. Nothing waits for an answer then.
        """
        awaited: set[int] | dict[int, Frame] = self._unanswered
        if buckets is not None:
            awaited = {bucket for bucket in buckets if bucket in self._unanswered}
            self._awaited.append(awaited)
        try:
            done = self.changed.wait_for(lambda: self._error or not awaited, seconds)
        finally:
            if buckets is not None:
                self._awaited = [each for each in self._awaited if each is not awaited]
        if self._error is not None:
            error, self._error = self._error, None
            self._forget_unanswered()
            raise error
        return bool(done)

    def read(self, seconds: float) -> None:
        """Take the answers of all frames on this thread, as far as the streams let it; call ``wait`` after it.

        Args:
            seconds: longest time to read.
        """
        deadline = time.monotonic() + seconds
        for shard, stream in tuple(self._streams.items()):
            stream.read(functools.partial(self._done, shard), deadline - time.monotonic())

    def _done(self, shard: int) -> bool:
        """Whether nothing of a shard is awaited any more."""
        return self._error is not None or not self._num_unanswered[shard]

    def pause(self, seconds: float) -> bool:
        """Wait for ``seconds``; returns True at once when ``close`` is called."""
        return self._stopping.wait(seconds)

    def close(self) -> None:
        """End all streams; frames that were sent are delivered first."""
        self._stopping.set()
        with self._lock:
            streams = tuple(self._streams.values())
            self._streams.clear()
            self._opened = [number + 1 for number in self._opened]  # what still comes is ignored
            self._forget_unanswered()
        for stream in streams:
            stream.close()

    # -------------------------------------------------------------- inside

    def _forget_unanswered(self) -> None:
        self._unanswered.clear()
        self._ahead.clear()
        for shard in range(len(self._shards)):
            self._undecided[shard].clear()
            self._copies[shard].clear()
            self._ahead_bytes[shard] = self._num_unanswered[shard] = 0
        for awaited in self._awaited:
            awaited.clear()

    def _open(self, shard: int, latest: int | None = None, *, dialled: Dialled | None = None) -> None:
        """Open the stream to one shard and send again what the shard has not answered.

        Args:
            shard: number of the shard.
            latest: number of a stream; nothing is done if a later one was opened meanwhile.
            dialled: socket that the stream goes over, if it was dialled already.
        """
        link = self._shards[shard].link
        dialled = dialled or link.dial()  # nobody waits for the lock meanwhile
        with self._lock:  # so that the stream cannot end before it is known
            if latest not in (None, self._opened[shard]):
                dialled.close()
                return
            self._opened[shard] = number = self._opened[shard] + 1
            stream = link.open(
                dialled,
                lambda message: self._receive(shard, number, message),
                lambda error: self._end(shard, number, error),
                lambda head, size: self._place(shard, head, size) if number == self._opened[shard] else None,
            )
            stream.send(self._hello, overtake=True)  # so that it stays ahead of those that overtake
            self._streams[shard] = stream
            self._opening.discard(shard)
            kept = (*self._ahead.items(), *self._unanswered.items())
            for bucket, frame in kept:  # under the lock: ``own_unanswered`` has to find the stream sending them
                if self._shard_of[bucket] == shard:
                    stream.send(frame)

    def _receive(self, shard: int, number: int, message: Frame) -> bool:
        """Take a message of the stream ``number``; one of an earlier stream is ignored. Returns as ``OnMessage``."""
        if number != self._opened[shard]:
            return True
        self._heard[shard] = time.monotonic()
        return self._on_message(shard, message) or self._num_unanswered[shard] > 0

    def _end(self, shard: int, number: int, error: PsError) -> None:
        """Note the end of the stream ``number``, on its reader thread; open it again, also while nobody waits."""
        with self._lock:
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
        with self._lock:
            if number != self._opened[shard]:
                return
            self._opening.discard(shard)
            if self._error is None and not self._stopping.is_set():
                self._error = error
                self.changed.notify_all()

    def _reopen(self, shard: int, number: int, error: PsError) -> PsError | None:
        """Open a broken stream again where a server serves.

        Returns:
            None if it is open, or a later one is; else the reason why not.
        """
        servers = self._shards[shard]
        begin, patience = time.monotonic(), servers.patience(self._lease)
        deadline, not_yet = begin + patience, ""
        if isinstance(error, EndedHere):
            log.info("the stream to %s is opened again: %s", servers.link.address, error)
        else:
            log.warning("lost the connection to %s (%s); trying again for %g s", servers.link.address, error, patience)
        late = False  # one try begins after the deadline: this process may have been stopped until then
        pause = 0.0  # the first try comes at once: a standby may be there
        while not late and not self._stopping.wait(pause):
            pause = RETRY_SECONDS
            if number != self._opened[shard]:
                return None
            late = time.monotonic() > deadline
            try:
                if (now := servers.find_serving()) is None:
                    not_yet = servers.tried
                    continue
                self._on_back(shard, now)
            except FINAL as final:
                return final
            except PsError as failure:
                not_yet = str(failure)
                continue
            self._open(shard, number)
            servers.link.interrupt()  # calls that still wait for the former server
            return None
        return Unreachable(
            f"lost shard {shard} ({error}) and found no server of it for {time.monotonic() - begin:.1f} s (lease "
            f"{self._lease:g} s): {not_yet or servers.tried}; start the servers again with --resume, then this worker, "
            "and give ps-serve a longer --lease if a server needs longer than that to come back"
        )
