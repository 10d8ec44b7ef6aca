"""A lead that takes a shard's question for a norm and does not answer: the shard gives up in time and says for whom."""

import asyncio
import math
from typing import Any

import grpc
import pytest

from tests.support.jobs import SECONDS
from torch_ps.common.errors import ServerStopped, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.channel import SERVICE
from torch_ps.common.rpc.credentials import OPEN
from torch_ps.common.wire.address import Address
from torch_ps.ps.cluster import lead_client
from torch_ps.ps.cluster.lead_client import LeadClient
from torch_ps.ps.core.effects import UpdateKey
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.server.shutdown import last_word


class Lead:
    """Keeps everybody waiting until it has been asked ``patience`` times."""

    def __init__(self, patience: float) -> None:
        self.patience, self.asked = patience, 0

    async def norm(self, request: bytes, context: Any) -> bytes:
        self.asked += 1
        if self.asked > self.patience:
            return pb.NormReply(square=pb.NormRequest.FromString(request).square + 9.0).SerializeToString()
        await asyncio.Event().wait()
        raise AssertionError

    async def ask(self, group: UpdateKey, seconds: float) -> float | None:
        """What shard 1 hears of it."""
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE, {"Norm": grpc.unary_unary_rpc_method_handler(self.norm, None, None)}
                ),
            )
        )
        address = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        try:
            lead = LeadAddress([address])
            client = LeadClient(lead, shard=1, incarnation=7, access=OPEN, lease=SECONDS, norm_seconds=seconds)
            async with asyncio.timeout(SECONDS):
                return await client.request_norm(group, 16.0)
        finally:
            await server.stop(None)


@pytest.mark.parametrize(("group", "what"), [(("", 0, 3), "step 3"), (("w0", 5, 3), "step 3 of worker w0")])
def test_shard_that_gets_no_norm_gives_up_and_says_who_owes_it(
    group: UpdateKey, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lead_client, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(lead_client, "RETRY_SECONDS", 0.01)
    lead = Lead(math.inf)
    with pytest.raises(
        WaitTimeout, match=rf"shard 1 has waited for \d.* s for the lead at 127.0.0.1:\d+ to say the norm of {what} \("
    ) as caught:
        asyncio.run(lead.ask(group, 0.2))
    told = last_word(1, caught.value)  # the shard ends, and its workers hear why
    assert isinstance(told, ServerStopped)
    assert str(told) == f"shard 1 failed: {caught.value}"


def test_question_that_is_not_answered_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lead_client, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(lead_client, "RETRY_SECONDS", 0.01)
    lead = Lead(2)
    assert asyncio.run(lead.ask(("", 0, 3), SECONDS)) == 25.0
    assert lead.asked > 2
