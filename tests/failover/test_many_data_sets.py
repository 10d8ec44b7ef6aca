"""A standby takes over a job whose data sets do not fit into one message of a worker."""

from pathlib import Path
from typing import Any

import torch

from tests.support.jobs import SECONDS, job, ready, start_server, until
from tests.support.raw import secret_of
from tests.support.raw_worker import raw_workers
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES
from torch_ps.ps.core.dataset_register import MAX_OF_WORKER

NAMES = ("h0", "h1", "h2", "h3", "h4")


def test_standby_attaches_where_members_have_brought_as_many_data_sets_as_they_may(tmp_path: Path) -> None:
    with (
        job(mode="async", lease=SECONDS) as servers,
        raw_workers(servers, {"a": torch.zeros(8)}, NAMES, hyper={"lr": 0.5}) as workers,
    ):
        for worker in workers:
            call: Any = worker._peers[0]._channel.unary_unary(channel.method("Data"), None, pb.DataReply.FromString)
            request = pb.DataRequest(worker=worker.name, session=worker.session, secret=secret_of(worker.name))
            request.batch = request.epochs = 1
            calls = []
            for number in range(MAX_OF_WORKER):
                name = f"{worker.name} {number}".ljust(100, chr(0x1F600))  # 12 characters each in JSON
                request.data.CopyFrom(pb.DataSet(name=name, size=8))
                calls.append(call.future(request.SerializeToString(), timeout=SECONDS))
                if len(calls) % 32 == 0:
                    assert all(each.result().answer == pb.DataReply.PORTION for each in calls[-32:])
        config = ServerConfig(
            listen="127.0.0.1:0",
            standby_of=servers.addresses[0],
            metrics="127.0.0.1:0",
            ready_file=str(tmp_path / "ready"),
        )
        standby = start_server(config, tmp_path / "log")
        try:
            ready(standby, tmp_path / "ready")
            until(
                lambda: "all of shard 0 is here" in standby.output or "larger than max" in servers.log + standby.output,
                "the standby has all",
            )
            assert "all of shard 0 is here" in standby.output, servers.log + standby.output
            assert len(NAMES) * MAX_OF_WORKER * 12 * 90 > MAX_MESSAGE_BYTES
        finally:
            standby.kill()
