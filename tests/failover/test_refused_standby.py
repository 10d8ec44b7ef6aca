"""A standby that cannot follow: the primary says why, and a second one is told what it waits for."""

import logging
from collections.abc import AsyncIterator

import pytest

from tests.fuzz.server import Context
from tests.fuzz.whole_job import WholeJob
from torch_ps.common import version
from torch_ps.common.errors import Refused
from torch_ps.common.pb import parameter_server_pb2 as pb


async def hello() -> AsyncIterator[bytes]:
    told = pb.ReplicaHello(server="127.0.0.1:3/t", version=version.current())
    yield pb.ReplicaUp(hello=told).SerializeToString()


def test_primary_says_why_a_standby_does_not_follow_and_what_a_second_one_waits_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = WholeJob(1, "sync", "SGD")
    try:
        job.attach()
        refused = job.run(job.server.servicer.replicate(hello(), Context()))  # type: ignore[arg-type]
        assert isinstance(refused, Refused)
        assert "has a standby at 127.0.0.1:2 already and takes one at a time; this one waits" in str(refused)
        with caplog.at_level(logging.INFO, "torch_ps.ps"):
            job.receipts.put_nowait(pb.ReplicaUp(failed="no memory for bucket 3").SerializeToString())
            job.run(job.server.settle())
        assert "the standby at 127.0.0.1:2 " in caplog.text
        assert ": it cannot follow: no memory for bucket 3" in caplog.text
    finally:
        job.end()
