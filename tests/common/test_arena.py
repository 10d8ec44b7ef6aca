"""Regions of shared memory: what is refused before a byte is mapped, and that a reader never keeps a mixture."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.threads import spawn
from torch_ps.common import arena as arena_module
from torch_ps.common.arena import Arena, Layout, Offer
from torch_ps.common.errors import NoSharedMemory
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec


def buckets(*sizes: int) -> tuple[Bucket, ...]:
    specs = tuple(TensorSpec(f"t{i}", (size,)) for i, size in enumerate(sizes))
    return plan(Model("SGD", (Group(specs, {"lr": 0.1}),)), 4096, 1).buckets


def test_places_are_disjoint_on_cache_lines_and_behind_the_table() -> None:
    parts = buckets(5000, 7, 3001)
    layout, end = Layout(parts), 0
    for bucket in parts:
        begin, stop = layout.span(bucket.index)
        assert begin % 64 == 0
        assert begin >= max(end, 64 + 16 * len(parts))
        assert stop - begin == 4 * bucket.numel
        end = stop
    assert end <= layout.size


def test_peer_sees_what_is_written_and_cannot_write() -> None:
    layout = Layout(buckets(100))
    mine = Arena.create(layout)
    theirs = Arena.open(layout, mine.offer)
    torch.frombuffer(mine.values(0), dtype=torch.float32).fill_(3.0)
    assert (np.frombuffer(theirs.values(0), np.float32) == 3).all()
    with pytest.raises(TypeError, match="read-only"):
        theirs.values(0)[0] = 1


def other(**changes: object) -> Offer:
    return dataclasses.replace(ARENA.offer, **changes)  # type: ignore[arg-type]


LAYOUT = Layout(buckets(100))
ARENA = Arena.create(LAYOUT)
FILE = os.open(__file__, os.O_RDONLY)
PIPE, _ = os.pipe()
GROWS = os.memfd_create("grows", os.MFD_ALLOW_SEALING)
os.ftruncate(GROWS, LAYOUT.size)


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (other(host="somewhere else"), "another host"),
        (other(host=""), "another host"),
        (other(host=f"{ARENA.offer.host.split()[0]} net:[1]"), "another host"),
        (other(size=LAYOUT.size + 4096), "buckets of this shard need"),
        (other(pid=2**31 - 1), "cannot be seen"),
        (other(pid=1), "cannot be seen|no memory of this user|cannot be mapped|may shrink|not the region"),
        (other(fd=10_000), "cannot be seen"),
        (other(fd=FILE), "may shrink"),
        (other(fd=PIPE), "it is not a memory file"),
        (other(fd=GROWS), "may shrink"),
        (other(token=bytes(16)), "not the region that was offered"),
        (other(token=b""), "not the region that was offered"),
    ],
    ids=[
        "host",
        "no host",
        "namespace",
        "size",
        "process",
        "foreign process",
        "descriptor",
        "file",
        "pipe",
        "unsealed",
        "token",
        "no token",
    ],
)
def test_what_is_not_as_offered_is_not_mapped(offer: Offer, why: str) -> None:
    with pytest.raises(NoSharedMemory, match=why):
        Arena.open(LAYOUT, offer)


#: What another process of this user tries with the region at a path; prints what it could do.
ATTEMPTS = """
import mmap, os, sys
path, size = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDWR)
attempts = {
    "maps it to write": lambda: mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE),
    "writes": lambda: os.pwrite(fd, bytes(8), 4096),
    "shrinks it": lambda: os.ftruncate(fd, 4096),
    "grows it": lambda: os.ftruncate(fd, size + 4096),
    "reads": lambda: mmap.mmap(fd, size, prot=mmap.PROT_READ)[0],
    "maps it privately": lambda: mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE)[0],
}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        continue
    print(name)
"""


def can(arena: Arena) -> list[str]:
    """What another process of this user can do with a region."""
    path = f"/proc/{arena.offer.pid}/fd/{arena.offer.fd}"
    command = [sys.executable, "-c", ATTEMPTS, path, str(arena.offer.size)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\n")[:-1]


def test_no_other_process_changes_a_region_that_its_creator_writes() -> None:
    arena = Arena.create(LAYOUT)
    arena.values(0)[:] = b"7" * len(arena.values(0))
    assert can(arena) == ["reads", "maps it privately"]
    assert set(bytes(arena.values(0))) == {ord("7")}
    with pytest.raises(NoSharedMemory, match=r"cannot be mapped: .*Operation not permitted"):
        Arena.open(LAYOUT, arena.offer, writable=True)


def test_region_that_the_peer_writes_keeps_its_size() -> None:
    assert can(Arena.create(LAYOUT, peer_writes=True)) == ["maps it to write", "writes", "reads", "maps it privately"]


def test_region_is_not_made_where_the_kernel_cannot_seal_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_SEAL_FUTURE_WRITE", 1 << 20)  # a seal that no kernel has
    with pytest.raises(NoSharedMemory, match=r"that others cannot change: .*Invalid argument"):
        Arena.create(LAYOUT)


def test_reader_copies_again_what_changed_under_its_copy() -> None:
    arena = Arena.create(LAYOUT)
    reader = Arena.open(LAYOUT, arena.offer)
    versions = []
    for version in reader.attempts(0, os.getpid()):
        versions.append(version)
        if len(versions) == 1:
            with arena.changing(0, version=7):
                pass
    assert versions == [0, 7]


@pytest.mark.parametrize("found", [0, 1, 2**63, 2**64 - 2, 2**64 - 1])
def test_whatever_a_peer_writes_into_a_lock_is_a_lock(found: int) -> None:
    arena = Arena.create(LAYOUT, peer_writes=True)
    reader = Arena.open(LAYOUT, arena.offer)
    arena.memory[64:72] = found.to_bytes(8, "little")
    with arena.changing(0, version=7):
        assert int.from_bytes(reader.memory[64:72], "little") % 2
    assert list(reader.attempts(0, os.getpid())) == [7]


def test_reader_waits_while_a_bucket_is_being_changed() -> None:
    arena = Arena.create(LAYOUT)
    reader = Arena.open(LAYOUT, arena.offer)
    with arena.changing(0, version=1):
        found = spawn(lambda: list(reader.attempts(0, os.getpid())))
        assert not found.done()
    assert found.result(30) == [1]


def test_no_copy_is_a_mixture_of_two_versions() -> None:
    layout = Layout(buckets(1000))
    arena = Arena.create(layout)
    reader = Arena.open(layout, arena.offer)
    values, seen = torch.frombuffer(arena.values(0), dtype=torch.float32), np.empty(1000)

    def write() -> None:
        for version in range(1, 3000):
            with arena.changing(0, version):
                values[:500].fill_(version)
                values[500:].fill_(version)

    writing = spawn(write)
    while not writing.done():
        version = 0
        for version in reader.attempts(0, os.getpid()):  # noqa: B007
            seen[:] = np.frombuffer(reader.values(0), np.float32)
        assert (seen == version).all()
    writing.result()


def test_region_outlives_neither_of_its_processes() -> None:
    """It has no name, so nothing of it can stay in any folder."""
    arena = Arena.create(Layout(buckets(10)))
    assert not [name for name in os.listdir("/dev/shm") if "torch-ps" in name]
    assert os.stat(f"/proc/self/fd/{arena.offer.fd}").st_nlink == 0
