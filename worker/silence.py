"""A server that is stopped keeps its connections open: whether it still lives shows only if it is asked.

    every third of a lease: has anything come from this shard? --no--> Describe --no answer, for a lease--> given up

Rules of this file
  1. Only where another server could take over: elsewhere the connection is all there is.
"""

import threading
import time
from collections.abc import Sequence

from torch_ps.common.errors import Unreachable
from torch_ps.worker.exchange import Exchange
from torch_ps.worker.voter import Voter


def watch(exchange: Exchange, voters: Sequence[Voter], lease: float) -> None:
    """Begin to watch all shards of ``exchange``, until it is closed."""
    threading.Thread(target=_watch, args=(exchange, voters, lease), name="silence", daemon=True).start()


def _watch(exchange: Exchange, voters: Sequence[Voter], lease: float) -> None:
    heard = [time.monotonic()] * len(voters)
    while not exchange.pause(lease / 3):
        for shard, voter in enumerate(voters):
            if len(voter.servers) > 1:
                heard[shard] = _look(exchange, shard, voter, max(heard[shard], exchange.heard(shard)), lease)


def _look(exchange: Exchange, shard: int, voter: Voter, heard: float, lease: float) -> float:
    """Ask a shard that has said nothing lately; when it was heard last, on ``time.monotonic()``."""
    begin = time.monotonic()
    if not exchange.has(shard):
        return begin  # it is being looked for
    if begin - heard < lease / 4:
        return heard
    try:
        return voter.link.sign(heard)
    except Unreachable as error:
        exchange.give_up(shard, error)
        voter.link.interrupt()
        return heard
