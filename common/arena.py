"""Shared-memory regions in which a worker and a server on one host read each other's buckets.

    creator: memfd, mapped, sealed --Offer(host, pid, fd, token, size)--> peer: /proc/PID/fd/FD, checked, mapped

    [ token | per bucket: lock, version | values of bucket 0 | values of bucket 1 | ... ]

Rules of this file
  1. A region has no name: only processes of the same user on the same host can open it, and the kernel frees it when
     the last of them ends, however it ends.
  2. An offer is untrusted: owner, kind, seals and size are checked before the region is mapped, the token before it is
     used. The seals keep a region from shrinking under its readers.
  3. One side writes a region and the other reads it. A region that its creator writes is sealed against all others:
     they can neither map it to write, nor write to it, nor punch holes into it, though they run as the same user.
  4. A reader whose tensors user code may write to maps the region ``private``: such writes stay in its process, until
     ``revert``.

A *lock* is a counter that is odd while its bucket is being changed. A reader copies, and copies again if the counter
differs afterwards: the copy may be a mixture of two versions.

Source: memfd_create(2), fcntl(2) for seals; the lock is a seqlock, Lameter, "Effective
synchronization on Linux/NUMA systems", 2005.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import select
import stat
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torch_ps.common.errors import NoSharedMemory, Unreachable
from torch_ps.common.host_id import host_id
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.private_pages import written_pages

_TOKEN = 16
_HEAD = 64
_ENTRY = 16  # lock and version of one bucket, uint64 each
#: Largest value of a lock; the next one is 0.
_LARGEST = (1 << 64) - 1
#: Seal that leaves the mapping which exists the only one that can write; Linux 5.1, not named by Python before 3.13.
_SEAL_FUTURE_WRITE = 0x0010
#: Buckets begin on cache lines, their values on a page of their own.
LINE, _PAGE = 64, 4096
#: Seconds that a reader waits for a bucket that is being changed, and seconds between two polls.
_LOCKED_SECONDS, _LOOK_SECONDS = 5.0, 5e-5


@dataclass(frozen=True, slots=True)
class Offer:
    """Location of a region, and the token that identifies it.

    Attributes:
        host: ``host_id()`` of the process that made it; process ids are unique within one host only.
        pid: id of that process.
        fd: its file descriptor of the region.
        token: random bytes at the start of the region.
        size: length of the region in bytes.
    """

    host: str
    pid: int
    fd: int
    token: bytes
    size: int


class Layout:
    """Positions of one shard's buckets in a region; both sides compute them from the plan."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.places: dict[int, int] = {}  # bucket -> row of the table
        self._spans: dict[int, tuple[int, int]] = {}
        at = -(-(_HEAD + _ENTRY * len(buckets)) // _PAGE) * _PAGE
        for place, bucket in enumerate(buckets):
            self.places[bucket.index] = place
            self._spans[bucket.index] = at, at + 4 * bucket.numel
            at = -(-(at + 4 * bucket.numel) // LINE) * LINE
        self.size = at

    def span(self, bucket: int) -> tuple[int, int]:
        """Byte offsets of the first value of a bucket and of the end of its values."""
        return self._spans[bucket]


class Arena:
    """One mapped region. ``memory`` is writable on the side that writes, read-only on the other.

    ``create`` and ``open`` raise ``NoSharedMemory`` with the reason if the region cannot be made or opened.
    """

    def __init__(self, layout: Layout, region: mmap.mmap, offer: Offer) -> None:
        self.layout, self.offer, self._region = layout, offer, region
        self.memory = memoryview(region)
        self._table = np.frombuffer(region, np.uint64, 2 * len(layout.places), _HEAD).reshape(-1, 2)

    @classmethod
    def create(cls, layout: Layout, *, peer_writes: bool = False) -> "Arena":
        """Make a region of this process, filled with zeros.

        Args:
            layout: layout of the buckets.
            peer_writes: whether the peer writes it; if not, nobody can but this process.
        """
        fd = -1
        try:
            fd = os.memfd_create("torch-ps", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, layout.size)
            region = mmap.mmap(fd, layout.size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals if peer_writes else seals | _SEAL_FUTURE_WRITE)
        except (OSError, AttributeError) as error:
            if fd >= 0:
                os.close(fd)
            raise NoSharedMemory(
                f"cannot make {layout.size} bytes of shared memory that others cannot change: {error}"
            ) from None
        token = secrets.token_bytes(_TOKEN)
        region[:_TOKEN] = token
        arena = cls(layout, region, Offer(host_id(), os.getpid(), fd, token, layout.size))
        weakref.finalize(arena, os.close, fd)  # the peer opens it by this number
        return arena

    @classmethod
    def open(cls, layout: Layout, offer: Offer, *, writable: bool = False, private: bool = False) -> "Arena":
        """Map a region of another process of this user and host.

        Args:
            layout: layout of the buckets, the same as on the side that made the region.
            offer: location of the region as the peer gave it; untrusted.
            writable: True on the side that writes the region; the other maps it read-only.
            private: True to make writes of this process visible to it alone, until ``revert``.
        """
        if not offer.host or offer.host != host_id():
            raise NoSharedMemory("it is on another host")
        if offer.size != layout.size:
            raise NoSharedMemory(f"it has {offer.size} bytes; the buckets of this shard need {layout.size}")
        path = f"/proc/{int(offer.pid)}/fd/{int(offer.fd)}"
        try:
            # stat before open: opening a pipe or a device may block or have an effect.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise NoSharedMemory("it is not a memory file")
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NoSharedMemory(f"process {offer.pid} cannot be seen from here: {error.strerror}") from None
        try:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable or private else 0)
            region = cls._map(fd, offer, protection, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
        finally:
            os.close(fd)
        return cls(layout, region, offer)

    @staticmethod
    def _map(fd: int, offer: Offer, protection: int, flags: int) -> mmap.mmap:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise NoSharedMemory("it is not a memory file of this user")
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed or facts.st_size != offer.size:
            raise NoSharedMemory(f"it has {facts.st_size} bytes and may shrink; {offer.size} sealed ones were offered")
        try:
            region = mmap.mmap(fd, offer.size, flags=flags, prot=protection)
        except (OSError, ValueError, OverflowError) as error:
            raise NoSharedMemory(f"it cannot be mapped: {error}") from None
        if not secrets.compare_digest(region[:_TOKEN], offer.token):
            raise NoSharedMemory("it is not the region that was offered")
        return region

    def values(self, bucket: int) -> memoryview:
        """The fp32 values of one bucket, as bytes."""
        begin, end = self.layout.span(bucket)
        return self.memory[begin:end]

    def tensor(self, begin: int, end: int) -> torch.Tensor:
        """The fp32 values between two bytes, as a tensor of their own."""
        return torch.frombuffer(self.memory[begin:end], dtype=torch.float32)

    def revert(self, bucket: int) -> None:
        """Drop this process's writes to one bucket of a ``private`` region; the writer's values show again.

        Works on whole pages, so writes beside the bucket on its first and last page are dropped too.
        Cost: 8 us per MB to read the state of every page; mapping all of them anew would cost as much as a copy.
        """
        begin, end = self.layout.span(bucket)
        first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
        address = np.frombuffer(self._region, np.uint8).ctypes.data // mmap.PAGESIZE
        written = written_pages(address + first, address + last)
        if written is None:  # the system does not tell, so drop every page
            self._region.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
            return
        for page in np.flatnonzero(written).tolist():
            self._region.madvise(mmap.MADV_DONTNEED, (first + page) * mmap.PAGESIZE, mmap.PAGESIZE)

    # -------------------------------------------------------------- the lock of a bucket

    @contextlib.contextmanager
    def changing(self, bucket: int, version: int) -> Iterator[None]:
        """Writer: hold the lock while the values become those of ``version``. One writer per bucket at a time."""
        entry = self._table[self.layout.places[bucket]]
        # Odd, even if an earlier writer was killed in here; whatever is there, as a worker can write to its answers.
        lock = (int(entry[0]) + 1 | 1) & _LARGEST
        entry[0] = lock
        try:
            yield
        finally:
            entry[1] = version
            entry[0] = lock + 1 & _LARGEST

    def unchanged(self, bucket: int) -> Callable[[], bool]:
        """Writer, between two changes: a function that says whether the values of a bucket are as they are now."""
        entry = self._table[self.layout.places[bucket]]
        now = int(entry[0])
        return lambda: int(entry[0]) == now

    def attempts(self, bucket: int, writer: int) -> Iterator[int]:
        """Reader: yield the version for each attempt to copy; end after the first consistent copy.

        Args:
            bucket: number of the bucket.
            writer: process id of the server that writes it.

        Raises:
            Unreachable: the writer has ended, or no copy was consistent for 5 s.
        """
        entry, deadline = self._table[self.layout.places[bucket]], time.monotonic() + _LOCKED_SECONDS
        while time.monotonic() < deadline:
            before = int(entry[0])
            if before % 2 == 0:
                yield int(entry[1])
                if int(entry[0]) == before:
                    return
            elif _runs(writer):
                time.sleep(_LOOK_SECONDS)
            else:
                raise Unreachable(f"server process {writer} ended while it wrote bucket {bucket}")
        raise Unreachable(f"no consistent copy of bucket {bucket} in {_LOCKED_SECONDS:g} s; its server hangs")


def _runs(process: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        handle = os.pidfd_open(process)
    except OSError as error:  # such as too many open files: nobody knows
        return error.errno != errno.ESRCH
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(handle)


def offer_to_proto(offer: Offer) -> pb.ArenaOffer:
    return pb.ArenaOffer(host=offer.host, pid=offer.pid, fd=offer.fd, token=offer.token, size=offer.size)


def offer_from_proto(message: pb.ArenaOffer) -> Offer:
    return Offer(message.host, message.pid, message.fd, message.token, message.size)
