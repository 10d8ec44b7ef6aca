"""What a handler raises, and what becomes of it."""

import asyncio
from typing import Any

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

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
