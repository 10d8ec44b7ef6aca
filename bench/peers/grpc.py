"""What gRPC can do from Python: the traffic of a round as messages of a bidirectional stream, and no arithmetic.

Built like this project's own server and workers (asyncio there, threads here, freed memory kept), and no more: what
this takes over ``tcp`` is gRPC's, what the network plane takes over this is ours.

Every worker sends its gradient, cut into messages of 4 MiB. The server answers each message with that part of the
parameters, in sync once it has it of all workers, so that both ways are busy at once. They never change, so the check
of the answer is that they arrived.
"""

import asyncio
import queue
from collections.abc import AsyncIterator
from typing import Any

import grpc
import torch

from bench.rounds import Job, flat, measure
from torch_ps.common.allocator import keep_freed_memory
from torch_ps.common.rpc import channel
from torch_ps.common.wire.frames import MAX_BUCKET_BYTES

METHOD = "/bench.Ceiling/Round"


def server(job: Job) -> None:
    keep_freed_memory()
    asyncio.run(_serve(job))


async def _serve(job: Job) -> None:
    parts = _parts(flat(job.work.size)[0])
    outboxes: list[asyncio.Queue[bytes]] = []
    arrived = [0] * len(parts)

    async def exchange(messages: AsyncIterator[bytes], context: Any) -> None:
        outbox: asyncio.Queue[bytes] = asyncio.Queue()
        outboxes.append(outbox)

        async def write() -> None:
            while True:
                await context.write(await outbox.get())

        writing, number = asyncio.create_task(write()), 0
        async for _ in messages:
            arrived[number] += 1
            if job.work.mode == "async":
                outbox.put_nowait(parts[number])
            elif arrived[number] == job.work.workers:
                arrived[number] = 0
                for each in outboxes:
                    each.put_nowait(parts[number])
            number = (number + 1) % len(parts)
        writing.cancel()

    served = grpc.aio.server(options=channel.OPTIONS)
    served.add_generic_rpc_handlers((_Handler(exchange),))
    port = served.add_insecure_port("127.0.0.1:0")
    await served.start()
    job.publish("port", str(port))
    await served.wait_for_termination()


class _Handler(grpc.GenericRpcHandler):
    """One method, whose messages are bytes."""

    def __init__(self, behaviour: Any) -> None:
        self._behaviour = behaviour

    def service(self, handler_call_details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._behaviour)


def worker(job: Job, rank: int) -> None:
    keep_freed_memory()
    start, gradient = flat(job.work.size)
    pulled, out = torch.zeros_like(start), _parts(gradient)
    places = torch.split(pulled, MAX_BUCKET_BYTES // 4)
    outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{job.published('port')}", options=channel.OPTIONS) as connection:
        call: Any = connection.stream_stream(METHOD)
        answers = call(iter(outbox.get, b""))

        def one_round() -> None:
            for part in out:
                outbox.put(part)
            for place, answer in zip(places, answers, strict=False):
                place.copy_(torch.frombuffer(answer, dtype=torch.float32))

        measure(job, rank, one_round, lambda: pulled, error=lambda: float((pulled != start).sum()))
        outbox.put(b"")


def _parts(values: torch.Tensor) -> list[bytes]:
    return [part.numpy().tobytes() for part in torch.split(values, MAX_BUCKET_BYTES // 4)]
