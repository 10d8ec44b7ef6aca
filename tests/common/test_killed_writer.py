"""A bucket in shared memory whose writer was killed: readers get an error, and the next server repairs the bucket."""

import os
import subprocess

import pytest

from tests.common.test_arena import LAYOUT
from tests.support.threads import spawn
from torch_ps.common.arena import Arena
from torch_ps.common.errors import Unreachable


def test_bucket_whose_writer_was_killed_inside_is_read_when_its_successor_has_written_it() -> None:
    arena = Arena.create(LAYOUT)
    reader = Arena.open(LAYOUT, arena.offer)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as killed:
        killed.kill()
    arena._table[0][0] += 1  # as it was when the writer was killed
    with pytest.raises(Unreachable, match=f"server process {killed.pid} ended while it wrote bucket 0"):
        list(reader.attempts(0, killed.pid))
    with arena.changing(0, version=2):
        found = spawn(lambda: list(reader.attempts(0, os.getpid())))
        assert not found.done()
    assert found.result(30) == [2]
