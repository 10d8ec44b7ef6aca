"""Signs of life, both ways: a worker keeps its lease, and notices a server that stands still.

    every third of a lease: Renew --stream to the lead--> behind all that was sent before
                            Renew --call--> a shard that was silent lately; the lead also while it owes an answer
                                  <--answer-- it lives; none for a lease: given up, the stream opens where one serves

Rules of this file
  1. On a slow link a bucket travels for longer than a lease, so calls go over another connection than buckets.
  2. A server that is stopped keeps its connections open: whether it still lives shows only if it is asked.
  3. Where no other server could take over there is less hurry: it may be the machine that is slow.
"""

import threading
import time
from collections.abc import Sequence

from torch_ps.common.errors import Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.transport.shard_servers import ShardServers

#: Seconds of silence at least after which a server without a standby is given up.
ALONE_SECONDS = 20.0


def start_heartbeat(
    exchange: ShardStreams, shards: Sequence[ShardServers], worker: str, session: int, lease: float
) -> None:
    """Begin to, with all shards of ``exchange`` until it is closed; ``session`` 0: of an observer, who has no lease."""
    request = pb.RenewRequest(worker=worker if session else "", session=session)
    threading.Thread(target=_signs, args=(exchange, shards, request, lease), name="signs of life", daemon=True).start()


def _signs(exchange: ShardStreams, shards: Sequence[ShardServers], request: pb.RenewRequest, lease: float) -> None:
    frame = pack(pb.UpHeader(renew=pb.Renew()))
    heard = [time.monotonic()] * len(shards)
    while not exchange.pause(lease / 3):
        if request.session:
            exchange.send_unkept(0, frame)
        for shard, shard_servers in enumerate(shards):
            heard[shard] = max(heard[shard], exchange.heard(shard))
            if not exchange.has(shard):
                heard[shard] = time.monotonic()  # it is being looked for
            elif time.monotonic() - heard[shard] > lease / 4 or (not shard and exchange.waiting):
                heard[shard] = _ask(exchange, shard, shard_servers, request, heard[shard], lease)


def _ask(
    exchange: ShardStreams,
    shard: int,
    shard_servers: ShardServers,
    request: pb.RenewRequest,
    heard: float,
    lease: float,
) -> float:
    """When a shard was heard last, on ``time.monotonic()``."""
    try:
        return shard_servers.link.sign(
            request, heard, lease if len(shard_servers.servers) > 1 else max(lease, ALONE_SECONDS)
        )
    except Unreachable as error:
        exchange.give_up(shard, error)
        shard_servers.link.interrupt()
        return heard
