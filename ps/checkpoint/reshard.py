"""A checkpoint on another bucket plan: other shards, other buckets, or no buckets at all.

    old buckets:  [ w w w w | w w b b ]      values and state follow their elements, counters too;
    new buckets:  [ w w w | w w w | b b ]    the record is that of the old bucket with most of them

Rules of this file
  1. What is asked for is read, nothing else: one old bucket at a time is in memory.
  2. A ledger names pushes of old buckets, so none is taken over: whoever pushed before has to join again.

Cost: O(elements); memory of the new buckets.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torch_ps.common.plan import Bucket
from torch_ps.ps.engine.bucket_optimizer import by_element
from torch_ps.ps.engine.shard_state import BucketState, ShardState

#: Gives an old bucket by index.
Read = Callable[[int], BucketState]


def reshard(old: Sequence[Bucket], wanted: Sequence[Bucket], version: int, read: Read) -> ShardState:
    """The buckets ``wanted`` of another plan of the same model, at ``version``; ``old`` are read in their order."""
    tensors: dict[int, dict[str, torch.Tensor]] = {bucket.index: {} for bucket in wanted}
    shares: dict[int, Counter[int]] = {bucket.index: Counter() for bucket in wanted}
    records: dict[int, Mapping[str, Any]] = {}
    for source in old:
        overlaps = [(bucket, list(_overlaps(source, bucket))) for bucket in wanted if bucket.rule == source.rule]
        if not any(pieces for _, pieces in overlaps):
            continue
        part = read(source.index)
        records[source.index] = {**part.record, "ledger": {}}
        given = part.tensors if source.rule == "mean" else by_element(part.tensors, source.numel)
        for bucket, pieces in overlaps:
            for at, begin, count in pieces:
                shares[bucket.index][source.index] += count
                for key, tensor in given.items():
                    into = tensors[bucket.index].setdefault(key, torch.zeros(bucket.numel))
                    into[at : at + count] = tensor[begin : begin + count]
    found = {}
    for bucket in wanted:
        (most, _), *_ = shares[bucket.index].most_common(1)
        found[bucket.index] = BucketState(records[most], tensors[bucket.index])
    return ShardState(version, found)


def _overlaps(source: Bucket, target: Bucket) -> Iterator[tuple[int, int, int]]:
    """Offsets in ``target`` and ``source`` and the length of each run of elements that both have."""
    by_tensor = {piece.tensor: piece for piece in source.pieces}
    for piece in target.pieces:
        other = by_tensor.get(piece.tensor)
        if other is None:
            continue
        begin, end = max(piece.start, other.start), min(piece.stop, other.stop)
        if begin < end:
            yield piece.offset + begin - piece.start, other.offset + begin - other.start, end - begin
