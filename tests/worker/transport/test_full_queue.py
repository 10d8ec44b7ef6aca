"""A server to whom more new calls have come than it reads drops some of them unread: they are made again."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import grpc
import pytest

from tests.support.jobs import SECONDS, until
from tests.support.threads import spawn
from torch_ps.common import version
from torch_ps.common.errors import Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.channel import SERVICE, method
from torch_ps.common.rpc.status import is_unread
from torch_ps.common.wire.address import Address
from torch_ps.worker.transport import link as link_module
from torch_ps.worker.transport.link import Link

#: Calls that may wait until the event loop of the server asks for one.
MOST = 2
REPLIES = {
    "Describe": pb.JobDescription(version=version.current()),
    "Join": pb.JoinReply(session=1),
    "Seed": pb.SeedReply(),
    "Data": pb.DataReply(answer=pb.DataReply.OVER),
}


def serve(port: "Future[int]", go_on: threading.Event, over: threading.Event) -> None:
    """A server of gRPC's own whose event loop stands still until ``go_on``."""

    def handler(reply: bytes) -> Any:
        async def answer(messages: Any, _: Any) -> bytes:
            async for _ in messages:
                pass
            return reply

        return grpc.stream_unary_rpc_method_handler(answer)

    async def run() -> None:
        most = [("grpc.server.max_pending_requests", MOST), ("grpc.server.max_pending_requests_hard_limit", MOST)]
        server = grpc.aio.server(options=most)
        handlers = {name: handler(reply.SerializeToString()) for name, reply in REPLIES.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        number = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        port.set_result(number)
        go_on.wait(SECONDS)
        await asyncio.to_thread(over.wait, SECONDS)
        await server.stop(None)

    asyncio.run(run())


def test_call_that_a_full_queue_has_dropped_is_made_again_until_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    port, go_on, over = Future[int](), threading.Event(), threading.Event()
    server = spawn(lambda: serve(port, go_on, over))
    link, dropped = Link(Address("127.0.0.1", port.result(SECONDS))), set[int]()

    def seen(failure: grpc.RpcError) -> bool:
        dropped.add(threading.get_ident())
        return is_unread(failure)

    monkeypatch.setattr(link_module, "is_unread", seen)
    try:
        with grpc.insecure_channel(str(link.address)) as others:
            data: Any = others.unary_unary(method("Data"), None, None)
            filling = [data.future(b"") for _ in range(2 * MOST)]
            until(lambda: any(each.done() for each in filling), "the queue is full")
            with pytest.raises(Unreachable, match="has ended the call: more came than it reads"):
                link.status(0.5)
            calls = (
                spawn(lambda: link.describe(SECONDS)),
                spawn(lambda: link.join(pb.JoinRequest(), SECONDS)),
                spawn(lambda: link.seed(lambda: [b"", b""], SECONDS)),
                spawn(lambda: link.data(pb.DataRequest(), SECONDS)),
            )
            until(lambda: len(dropped) == 1 + len(calls), "each of them is dropped once")
            go_on.set()
            replies = [each.result(SECONDS) for each in calls]
            assert replies == [REPLIES["Describe"], REPLIES["Join"], None, REPLIES["Data"]]
    finally:
        go_on.set()
        over.set()
        link.close()
        server.result(SECONDS)
