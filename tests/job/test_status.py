"""The figures of a shard fit into one message, however many workers there are and whatever their names."""

import asyncio

import torch

from tests.fuzz.server import Context, Link, Server
from tests.support.raw import described, secret_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES, pack
from torch_ps.ps.core.roster import MAX_NAME, Member, Roster
from torch_ps.worker.transport.wait_reasons import describe_wait, waited_for

MODEL = described({"x": torch.zeros(1)}, hyper={"lr": 1.0})
NUM = 256


def long_name(number: int) -> str:
    return f"{number:05}" + "\U0001f600" * (MAX_NAME - 5)  # four bytes a character


def push_of(step: int) -> bytes:
    return pack(pb.UpHeader(push=pb.Push(step=step, base=step, weight=1.0, codec="none")), (bytes(4),))


async def status_of(server: Server) -> pb.StatusReply:
    reply = await server.servicer.status(pb.StatusRequest(), Context())  # type: ignore[arg-type]
    assert len(reply.SerializeToString()) < MAX_MESSAGE_BYTES
    return reply


def test_status_of_workers_with_long_names_that_wait_for_each_other_names_all_of_them() -> None:
    async def look() -> None:
        server = Server(ServerConfig(listen="127.0.0.1:0", workers=1, lease=3600.0))
        links = []
        for name in map(long_name, range(NUM)):
            secret, start = secret_of(name), server.incarnation
            join = pb.JoinRequest(worker=name, model=MODEL, secret=secret, incarnation=start)
            reply = await server.call("Join", join.SerializeToString())
            if reply.seed:
                seed = pb.SeedHeader(worker=name, session=reply.session, model=MODEL, secret=secret, incarnation=start)
                await server.stream("Seed", [pack(seed), pack(pb.SeedHeader(bucket=0), (bytes(4),))])
            hello = pb.Hello(worker=name, session=reply.session, secret=secret, incarnation=start)
            links.append(Link(server))
            links[-1].send(pack(pb.UpHeader(hello=hello)))
            if reply.seed:
                links[0].send(push_of(0))
            await server.settle()
        links[0].send(push_of(1))  # the last step without the others
        await server.settle()
        for link in links[: NUM // 2]:
            link.send(push_of(2))
        await server.settle()
        status = await status_of(server)
        await server.close()
        assert [each.worker for each in status.worker] == [long_name(number) for number in range(NUM)]
        assert waited_for(status.worker[0], status) == tuple(map(long_name, range(NUM // 2, NUM)))
        assert describe_wait(long_name(0), [status]).startswith(f"step 2 waits for {long_name(NUM // 2)}, ")

    asyncio.run(look())


def test_status_of_more_workers_than_a_message_has_room_for_counts_the_rest() -> None:
    async def look() -> None:
        server = Server(ServerConfig(listen="127.0.0.1:0", workers=1))
        members = tuple(Member(long_name(number), number + 1, None, 0) for number in range(20_000))
        server.parts.job.rosters.roster = Roster(20_000, members)
        status = await status_of(server)
        await server.close()
        assert len(status.worker) > 5_000
        assert len(status.worker) + status.more_workers == len(members)
        assert [each.rank for each in status.worker] == list(range(len(status.worker)))

    asyncio.run(look())
