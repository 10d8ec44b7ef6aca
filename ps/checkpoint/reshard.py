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
from types import MappingProxyType
from typing import Any

import torch

from torch_ps.common.plan import Bucket, Piece
from torch_ps.common.schema import TensorSpec
from torch_ps.common.tensor_words import read_words
from torch_ps.ps.engine.bucket_optimizer import by_element
from torch_ps.ps.engine.shard_state import BucketState, ShardState

#: Gives an old bucket by index.
Read = Callable[[int], BucketState]


def reshard(
    old: Sequence[Bucket],
    wanted: Sequence[Bucket],
    version: int,
    read: Read,
    copied: Mapping[int, TensorSpec] = MappingProxyType({}),
) -> ShardState:
    """The buckets of another plan of the same model.

    Args:
        old: Buckets that there are; they are read in this order.
        wanted: Buckets of the result.
        version: Version of the result.
        read: Gives the state of one of ``old``.
        copied: Buffers by index that are copied in ``wanted`` and averaged, as fp32, in ``old``.
    """
    if copied:
        old, read = _copy_buffers(old, wanted, read, copied)
    tensors: dict[int, dict[str, torch.Tensor]] = {bucket.index: {} for bucket in wanted}
    shares: dict[int, Counter[int]] = {bucket.index: Counter() for bucket in wanted}
    records: dict[int, Mapping[str, Any]] = {}
    for source in old:
        overlaps = [(bucket, list(_overlaps(source, bucket))) for bucket in wanted if bucket.rule == source.rule]
        if not any(pieces for _, pieces in overlaps):
            continue
        part = read(source.index)
        records[source.index] = {**part.record, "ledger": {}}
        given = part.tensors if source.rule != "optimizer" else by_element(part.tensors, source.numel)
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


def _copy_buffers(
    old: Sequence[Bucket], wanted: Sequence[Bucket], read: Read, copied: Mapping[int, TensorSpec]
) -> tuple[Sequence[Bucket], Read]:
    """``old`` with a bucket for each copied buffer that is wanted, and what reads them as well."""
    needed = {piece.tensor for bucket in wanted for piece in bucket.pieces} & set(copied)
    words: dict[int, BucketState] = {}
    more = []
    for number, index in enumerate(sorted(needed), len(old)):
        spec = copied[index]
        values = torch.zeros(spec.numel)
        for source in old:
            for piece in source.pieces if source.rule == "mean" else ():
                if piece.tensor == index:
                    state = read(source.index)
                    part = state.tensors["values"][piece.offset : piece.offset + piece.stop - piece.start]
                    values[piece.start : piece.stop] = part
        dtype = spec.torch_dtype
        buffer = values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)
        held = torch.empty(spec.places)
        read_words(buffer, 0, held)
        words[number] = BucketState(state.record, {"values": held})
        more.append(Bucket(number, 0, "copy", 0, spec.places, (Piece(index, 0, spec.places, 0),)))
    return [*old, *more], lambda index: words[index] if index in words else read(index)


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
