"""An ask for samples at a server that stands still ends when its stream is given up, not at its own deadline."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.support.jobs import SECONDS
from tests.support.threads import spawn
from torch_ps.common.errors import Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.channel import SERVICE
from torch_ps.common.wire.address import Address
from torch_ps.worker.transport.call_retry import call_with_retry
from torch_ps.worker.transport.link import Link


@pytest.mark.parametrize("wait", [False, True])
def test_ask_that_is_interrupted_is_asked_again(wait: bool) -> None:
    asked, go_on = threading.Semaphore(0), threading.Event()

    def data(request: bytes, context: Any) -> bytes:
        asked.release()
        go_on.wait(SECONDS)
        return pb.DataReply(answer=pb.DataReply.OVER).SerializeToString()

    server = grpc.server(ThreadPoolExecutor(3))
    handler: Any = grpc.unary_unary_rpc_method_handler(data)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Data": handler}),))
    link = Link(Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0")))
    server.start()
    try:
        ask: Callable[[], pb.DataReply] = lambda: link.data(pb.DataRequest(wait=wait), SECONDS)  # noqa: E731
        alone = spawn(ask)
        assert asked.acquire(timeout=SECONDS)
        link.interrupt()
        with pytest.raises(Unreachable, match="does not answer; another one may"):
            alone.result(SECONDS)
        again = spawn(lambda: call_with_retry(ask, SECONDS))
        assert asked.acquire(timeout=SECONDS)
        link.interrupt()
        assert asked.acquire(timeout=SECONDS)
        go_on.set()
        assert again.result(SECONDS).answer == pb.DataReply.OVER
    finally:
        go_on.set()
        link.close()
        server.stop(None)
