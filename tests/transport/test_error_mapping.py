"""What a handler raises, and what becomes of it."""

import asyncio
from typing import Any

import pytest
import torch
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from tests.support.jobs import job, until
from tests.support.raw_worker import raw_workers
from torch_ps.common.errors import PsError
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.error_mapping import map_errors


def test_call_that_comes_while_the_server_ends_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any, context: Any) -> None:
        raise cygrpc._ServerStoppedError("Server already stopped.")

    async def call() -> None:
        await map_errors(handler, Metrics())(b"", None)

    with pytest.raises(cygrpc._ServerStoppedError):  # gRPC takes it from here
        asyncio.run(call())
    assert "bug" not in caplog.text


def test_log_names_the_worker_whose_frame_says_nothing_about_it() -> None:
    with job() as servers, raw_workers(servers, {"x": torch.zeros(8)}, hyper={"lr": 0.5}) as (worker,):
        worker.push(0, torch.ones(8))
        worker.answer()
        worker.send(0, b"noise")
        with pytest.raises(PsError):
            worker.answer()
        until(lambda: "refused exchange" in servers.log, "the refusal is logged")
        assert "refused exchange of worker 'w0' at ipv4:127.0.0.1:" in servers.log
