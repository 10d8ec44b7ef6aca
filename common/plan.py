"""The bucket plan: how the flat parameter vector is cut into buckets and assigned to shards.

Rules of this file
  1. The plan is a pure function of model, bucket size and number of shards: both sides compute it and get the same.
  2. A bucket never spans two parameter groups, so one set of hyperparameters applies to all of it.
  3. Cuts inside a tensor fall on multiples of ``ALIGN`` elements from its start, so a fused kernel treats the same
     elements in vector and tail lanes as on the whole tensor and gives the same bits.

    group 0: [ w w w w w w | w w w b b b ]  group 1: [ e e e e | e e e e ]  averaged: [ m v ]  copied: [ q q ]
               bucket 0      bucket 1                 bucket 2   bucket 3               bucket 4         bucket 5
               shard 0       shard 1                  shard 0    shard 1                shard 0          shard 1

A group that is worth splitting is cut into equal parts, a multiple of the number of shards, which are assigned to the
shards in turn. That balances bytes and *time*: backward reaches neighbouring buckets one after the other, so all links
are busy at once.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Literal

from torch_ps.common.errors import ConfigError
from torch_ps.common.schema import Model, TensorSpec
from torch_ps.common.wire.frames import MAX_BUCKET_BYTES

#: Cuts are multiples of this many elements, a multiple of every CPU vector length (AVX-512 holds 16 floats).
ALIGN = 16
MIN_BUCKET_BYTES = 1024
#: A group with fewer elements per shard stays in one bucket: splitting it would cost messages and gain nothing.
WORTH_SPLITTING = 64

#: "optimizer": one optimizer step with the averaged gradient. Of buffers: "mean": the average replaces the value;
#: "copy": the value of the lowest rank does, as it is.
Rule = Literal["optimizer", "mean", "copy"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of one flattened tensor; of a copied buffer, its words (``tensor_words.py``).

    Attributes:
        tensor: index of the tensor in ``Model.tensors()``.
        start: first element.
        stop: element after the last one.
        offset: position of the first element in the bucket.
    """

    tensor: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """A contiguous slice of the flat parameter vector: the unit of messages and of optimizer steps.

    Attributes:
        index: number of the bucket in the job.
        shard: number of the shard that holds it.
        rule: what a step does with the averaged push, see ``Rule``.
        group: number of the parameter group; averaged and copied buffers are groups of their own after the last one.
        numel: number of elements.
        pieces: parts of tensors in the bucket, in order of ``offset``.
    """

    index: int
    shard: int
    rule: Rule
    group: int
    numel: int
    pieces: tuple[Piece, ...]

    def spans(self, positions: Iterable[int]) -> Iterator[slice]:
        """Where the pieces at ``positions`` lie in the bucket; neighbours that follow one another are one span."""
        begin = end = 0
        for position in positions:
            piece = self.pieces[position]
            if piece.offset != end:
                if end > begin:
                    yield slice(begin, end)
                begin = piece.offset
            end = piece.offset + piece.stop - piece.start
        if end > begin:
            yield slice(begin, end)

    def others(self, positions: Collection[int]) -> Iterator[slice]:
        """Where the pieces lie that are not at ``positions``, as with ``spans``."""
        if not positions:
            return iter((slice(0, self.numel),))
        return self.spans(at for at in range(len(self.pieces)) if at not in positions)


@dataclass(frozen=True, slots=True)
class Plan:
    """All buckets of a job, in order of their index."""

    buckets: tuple[Bucket, ...]
    num_shards: int

    def of_shard(self, shard: int) -> tuple[Bucket, ...]:
        return tuple(bucket for bucket in self.buckets if bucket.shard == shard)

    def elements_per_shard(self) -> list[int]:
        return [sum(bucket.numel for bucket in self.of_shard(shard)) for shard in range(self.num_shards)]


def plan(model: Model, bucket_bytes: int, num_shards: int) -> Plan:
    """Cut a model into buckets and assign them to shards.

    Args:
        model: groups and buffers of the job.
        bucket_bytes: most fp32 bytes of a bucket, 1 KiB to 4 MiB.
        num_shards: number of shards, at least 1.

    Raises:
        ConfigError: an argument is out of range.

    Cost: O(tensors + buckets); the largest shard is within 5 % of the mean for models of more than a few thousand
    elements per shard.
    """
    if not MIN_BUCKET_BYTES <= bucket_bytes <= MAX_BUCKET_BYTES:
        raise ConfigError(f"a bucket holds {MIN_BUCKET_BYTES} to {MAX_BUCKET_BYTES} bytes; got {bucket_bytes}")
    if num_shards < 1:
        raise ConfigError(f"at least one shard is needed; got {num_shards}")
    load = [0] * num_shards
    buckets: list[Bucket] = []
    for group, (rule, tensors) in enumerate(_regions(model)):
        parts = list(_split(tensors, bucket_bytes // 4, num_shards))
        for number, pieces in enumerate(parts):
            shard = number % num_shards if len(parts) > 1 else load.index(min(load))
            numel = pieces[-1].offset + pieces[-1].stop - pieces[-1].start
            load[shard] += numel
            buckets.append(Bucket(len(buckets), shard, rule, group, numel, pieces))
    return Plan(tuple(buckets), num_shards)


def _regions(model: Model) -> Iterator[tuple[Rule, list[tuple[int, TensorSpec]]]]:
    """Tensors that may share buckets, with their indices: each group, the averaged buffers, the copied ones."""
    numbered = enumerate(model.tensors())
    for group in model.groups:
        yield "optimizer", list(islice(numbered, len(group.tensors)))
    buffers = list(numbered)
    yield "mean", [each for each in buffers if not each[1].copied]
    yield "copy", [each for each in buffers if each[1].copied]


def _split(tensors: list[tuple[int, TensorSpec]], capacity: int, num_shards: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces of each bucket of one region, in nearly equal parts of at most ``capacity`` elements."""
    starts = list(accumulate((tensor.places for _, tensor in tensors), initial=0))
    total = starts[-1]
    if not total:
        return
    # Cuts move by up to ALIGN / 2 elements, so leave that much room in every bucket.
    count = -(-total // (capacity - ALIGN))
    if total >= num_shards * WORTH_SPLITTING:
        count = -(-count // num_shards) * num_shards
    cuts = [_aligned(total * cut // count, starts) for cut in range(1, count)]
    for begin, end in pairwise([0, *cuts, total]):
        pieces = []
        for index in range(bisect_right(starts, begin) - 1, len(tensors)):
            start, stop = max(begin, starts[index]), min(end, starts[index + 1])
            if start >= end:
                break
            if start < stop:
                pieces.append(Piece(tensors[index][0], start - starts[index], stop - starts[index], start - begin))
        yield tuple(pieces)


def _aligned(cut: int, starts: list[int]) -> int:
    """The allowed position nearest to ``cut``: a multiple of ALIGN within its tensor, or that tensor's end."""
    index = bisect_right(starts, cut) - 1
    begin, end = starts[index], starts[index + 1]
    return min(begin + (cut - begin + ALIGN // 2) // ALIGN * ALIGN, end)
