"""Heartbeats both ways: a worker keeps its lease, and notices a server that stands still.

    every third of a lease: Renew --stream to the lead--> behind all that was sent before
                            Renew --call--> a shard that was silent lately; the lead also while it owes an answer
                                  <--reply-- the server lives; none for a lease: its stream is opened where one serves

Rules of this file
  1. On a slow network a bucket travels for longer than a lease, so the calls use another connection than the buckets.
  2. A stopped server keeps its connections open, so only a call shows whether it lives.
  3. A server without a standby gets more time: nothing is gained by giving it up, and the machine may only be slow.
"""

import threading
import time
from collections.abc import Sequence

from torch_ps.common.errors import Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.transport.shard_servers import ShardServers

#: Seconds of silence, at least, after which a server without a standby is given up.
ALONE_SECONDS = 20.0


def start_heartbeat(streams: ShardStreams, shards: Sequence[ShardServers], who: Identity, lease: float) -> None:
    """Start the thread that exchanges heartbeats with all shards until ``streams`` is closed.

    Args:
        streams: streams to all shards.
        shards: servers of every shard, shard 0 first.
        who: identity of the worker; that of an observer has session 0 and no lease.
        lease: length of a lease in seconds.
    """
    request = pb.RenewRequest()
    if who.session:
        request.worker, request.session, request.secret = who.worker, who.session, who.secret
    threading.Thread(target=_run, args=(streams, shards, request, lease), name="heartbeat", daemon=True).start()


def _run(streams: ShardStreams, shards: Sequence[ShardServers], request: pb.RenewRequest, lease: float) -> None:
    frame = pack(pb.UpHeader(renew=pb.Renew()))
    heard = [time.monotonic()] * len(shards)
    while not streams.pause(lease / 3):
        if request.session:
            streams.send_unkept(0, frame)
        for number, shard in enumerate(shards):
            heard[number] = max(heard[number], streams.last_heard(number))
            if not streams.is_open(number):
                heard[number] = time.monotonic()  # its stream is being opened again
            elif time.monotonic() - heard[number] > lease / 4 or (not number and streams.waiting):
                patience = lease if len(shard.servers) > 1 else max(lease, ALONE_SECONDS)
                try:
                    heard[number] = shard.link.renew(request, heard[number], patience)
                except Unreachable as error:
                    streams.fail_stream(number, error)
                    shard.link.interrupt()
