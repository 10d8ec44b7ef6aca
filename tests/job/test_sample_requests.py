"""Asks for samples that wait on the lead: each is answered when there is an answer, whatever becomes of the others."""

import asyncio

from tests.core.job import member, roster
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.sample_assigner import SampleAssigner
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.job.sample_requests import SampleRequests


def test_repeat_of_an_ask_is_woken_although_the_ask_on_the_lost_connection_ends_after_it_has_begun() -> None:
    core = Shard(buckets=1, mode=Mode(), data=SampleAssigner(Mode()))
    core.set_roster(roster(2, member("a", 1), member("b", 2)))
    requests = SampleRequests()

    def ask(worker: str, session: int) -> asyncio.Task[pb.DataReply]:
        data = pb.DataSet(size=40)
        request = pb.DataRequest(worker=worker, session=session, data=data, batch=4, epochs=1, wait=True)
        return asyncio.create_task(requests.ask(core, request, 60.0))

    async def scene() -> pb.DataReply:
        lost = ask("a", 1)
        await asyncio.sleep(0)
        repeat = ask("a", 1)
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.wait({lost})
        assert requests.waiting("a", 1) is not None
        await ask("b", 2)
        return await asyncio.wait_for(repeat, 10.0)

    reply = asyncio.run(scene())
    assert reply.answer == pb.DataReply.PORTION
    assert requests.waiting("a", 1) is None
