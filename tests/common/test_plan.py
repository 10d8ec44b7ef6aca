"""The bucket plan: covers every element once, respects its limits, balances shards, and depends on nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_ps.common.errors import ConfigError
from torch_ps.common.plan import ALIGN, WORTH_SPLITTING, Plan, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.wire.frames import MAX_BUCKET_BYTES

SIZES = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


def model(*groups: list[int], buffers: list[int] | None = None) -> Model:
    """A model of one-dimensional tensors with these sizes."""
    names = iter(range(10**6))

    def specs(sizes: list[int]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"t{next(names)}", (size,)) for size in sizes)

    return Model("SGD", tuple(Group(specs(sizes), {"lr": 0.1}) for sizes in groups), specs(buffers or []))


def balance(found: Plan) -> float:
    loads = found.elements_per_shard()
    return max(loads) / (sum(loads) / len(loads))


@given(st.lists(SIZES, min_size=1, max_size=3), SIZES, st.sampled_from([1024, 1500, 4096, 1 << 20]), st.integers(1, 5))
def test_every_element_is_in_exactly_one_bucket(
    groups: list[list[int]], buffers: list[int], bucket_bytes: int, num_shards: int
) -> None:
    described = model(*groups, buffers=buffers)
    found = plan(described, bucket_bytes, num_shards)
    tensors = list(described.tensors())
    at = dict.fromkeys(range(len(tensors)), 0)
    for bucket in found.buckets:
        filled = 0
        for piece in bucket.pieces:
            assert (piece.offset, piece.start) == (filled, at[piece.tensor])
            at[piece.tensor] = piece.stop
            filled += piece.stop - piece.start
        assert filled == bucket.numel > 0
    assert list(at.values()) == [tensor.numel for tensor in tensors]


@given(st.lists(SIZES, min_size=1, max_size=3), SIZES, st.sampled_from([1024, 1500, 4096]), st.integers(1, 5))
def test_buckets_keep_their_limits(
    groups: list[list[int]], buffers: list[int], bucket_bytes: int, num_shards: int
) -> None:
    described = model(*groups, buffers=buffers)
    owner = [number for number, group in enumerate(described.groups) for _ in group.tensors]
    owner += [len(described.groups)] * len(described.buffers)
    for number, bucket in enumerate(plan(described, bucket_bytes, num_shards).buckets):
        assert bucket.index == number
        assert 4 * bucket.numel <= bucket_bytes
        assert 0 <= bucket.shard < num_shards
        assert {owner[piece.tensor] for piece in bucket.pieces} == {bucket.group}
        assert bucket.rule == ("mean" if bucket.group == len(groups) else "optimizer")
        for piece in bucket.pieces:
            assert piece.start % ALIGN == 0


@pytest.mark.parametrize("num_shards", [2, 3, 4, 7])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([50_000_000], id="one huge tensor"),
        pytest.param([40_000_000, *[500] * 40], id="a huge one among small ones"),
        pytest.param([768 * 2304, 2304, 768 * 768, 768, 768 * 3072, 3072] * 12, id="GPT"),
        pytest.param([100_003], id="a prime number of elements"),
    ],
)
def test_largest_shard_is_within_five_percent_of_the_mean(sizes: list[int], num_shards: int) -> None:
    assert balance(plan(model(sizes), MAX_BUCKET_BYTES, num_shards)) <= 1.05


def test_group_that_is_not_worth_cutting_stays_whole() -> None:
    (bucket,) = plan(model([WORTH_SPLITTING]), MAX_BUCKET_BYTES, 2).buckets
    assert bucket.numel == WORTH_SPLITTING


@pytest.mark.parametrize("bucket_bytes", [0, 1023, MAX_BUCKET_BYTES + 1])
def test_bucket_size_out_of_range_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"a bucket holds 1024 to {MAX_BUCKET_BYTES} bytes; got {bucket_bytes}"):
        plan(model([10]), bucket_bytes, 1)


def test_number_of_shards_has_to_be_positive() -> None:
    with pytest.raises(ConfigError, match="at least one shard is needed; got 0"):
        plan(model([10]), 4096, 0)
