"""State on another bucket plan: every element keeps its value, its optimizer state and its counters."""

import pytest

from tests.engine.test_bucket_optimizer import ELEMENTWISE, by_torch, drawn
from tests.support.sliced import CASES, Hyper, Sliced, gradients_of
from torch_ps.ps.checkpoint.reshard import reshard
from torch_ps.ps.engine.shard_state import BucketState

STEPS, STOP = 30, 12
#: How a number is given, and for how many tensors torch computes at once, changes nothing that is kept.
STATES = [case for case in ELEMENTWISE if "foreach" not in case and "tensor" not in case]
PLANS = [((1024, 1), (1024, 3)), ((1 << 20, 1), (1024, 2)), ((1024, 3), (1 << 20, 1))]


def on_another_plan(before: Sliced, after: Sliced) -> None:
    read = {bucket.index: BucketState({}, before.store.export(bucket.index)) for bucket in before.buckets}
    for shard in {bucket.shard for bucket in after.buckets}:
        wanted = [bucket for bucket in after.buckets if bucket.shard == shard]
        for index, part in reshard(before.buckets, wanted, STOP, read.__getitem__).buckets.items():
            after.store.restore(index, part.tensors)


def trained_on_two(name: str, hyper: Hyper, one: tuple[int, int], other: tuple[int, int]) -> Sliced:
    before, after = Sliced(name, hyper, *one), Sliced(name, hyper, *other)
    for step in range(STOP):
        before.step(step, drawn(step))
    on_another_plan(before, after)
    for step in range(STOP, STEPS):
        after.step(step, drawn(step))
    return after


@pytest.mark.parametrize(("case", "plans"), [(case, PLANS[number % len(PLANS)]) for number, case in enumerate(STATES)])
def test_parameters_that_had_no_gradient_go_on_as_torch_has_them(
    case: str, plans: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    assert trained_on_two(*CASES[case], *plans).differing(by_torch(*CASES[case])) == []


def test_elements_with_one_history_share_their_counters_again() -> None:
    before, after = Sliced("NAdam", {}, 1024, 3), Sliced("NAdam", {}, 1 << 20, 1)
    for step in range(3):
        before.step(step, [gradients_of(step)])
    on_another_plan(before, after)
    for bucket in after.buckets:
        tensors = after.store.export(bucket.index)
        assert "has_state" not in tensors
        assert tensors["state/step"].shape == ()
        assert tensors["state/step"] == 3
