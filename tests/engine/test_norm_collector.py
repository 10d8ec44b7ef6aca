"""What the lead of a job with --clip-norm collects from the shards: only what an update can need, and no more of it."""

import asyncio
import math
from collections.abc import Callable

import pytest

from torch_ps.common.errors import ProtocolError
from torch_ps.common.wire.field_ranges import MAX_SQUARE
from torch_ps.ps.core.effects import UpdateKey
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.engine.grad_clip import WINDOW, NormCollector

NEXT = 100


def collector() -> NormCollector:
    """Collector of a job of three shards with one member, w0, whose next step is 100."""

    def answer(group: UpdateKey, square: float | None, then: Callable[[], None]) -> None:
        then()

    found = NormCollector([0, 1, 2], answer, lambda worker: NEXT)
    found.set_roster(Roster(1, (Member("w0", 1, 0, 0),), True))
    return found


def report(norms: NormCollector, group: UpdateKey, shard: int = 1, square: float = 1.0) -> float | None:
    return asyncio.run(norms.report(group, shard, square))


@pytest.mark.parametrize("step", [NEXT - WINDOW - 1, NEXT + WINDOW + 1, 10**9, 2**64 - 1])
@pytest.mark.parametrize("who", [("", 0), ("w0", 1)])
def test_norm_of_a_step_that_nobody_can_make_now_is_refused(who: tuple[str, int], step: int) -> None:
    with pytest.raises(ProtocolError, match=rf"the norm of step {step} of .* is asked for, and step 100 is next"):
        report(collector(), (*who, step))


@pytest.mark.parametrize("square", [math.nan, math.inf, -1.0, 2 * MAX_SQUARE, 1.7e308])
def test_norm_that_no_gradient_has_is_refused(square: float) -> None:
    with pytest.raises(ProtocolError, match="shard 1 cannot report a squared norm"):
        report(collector(), ("", 0, NEXT), square=square)


def test_norm_of_all_workers_names_no_session() -> None:
    with pytest.raises(ProtocolError, match="a step of all workers has no session"):
        report(collector(), ("", 7, NEXT))


def test_norms_of_those_who_are_not_members_are_dropped_and_not_kept() -> None:
    norms = collector()
    for session in range(2, 5000):
        assert report(norms, ("w0", session, NEXT)) is None
        assert report(norms, (f"w{session}", 1, NEXT)) is None
    assert not norms.answers
    assert not norms._reported


def test_what_is_collected_is_bounded_and_the_present_update_still_gets_its_norm() -> None:
    async def scene() -> tuple[int, float | None]:
        norms, open_groups = collector(), []
        for step in range(NEXT - 3 * WINDOW, NEXT + 3 * WINDOW):
            for who in (("", 0), ("w0", 1)):
                open_groups.append(asyncio.ensure_future(norms.report((*who, step), 1, 1.0)))
        await asyncio.sleep(0)
        held = len(norms._reported)
        group = ("w0", 1, NEXT)
        found = await asyncio.gather(norms.report(group, 0, 4.0), norms.report(group, 2, 4.0))
        norms.set_roster(Roster(2, (), True))
        for each in open_groups:
            each.cancel()
        await asyncio.gather(*open_groups, return_exceptions=True)
        return held, found[0]

    assert asyncio.run(scene()) == (2 * (2 * WINDOW + 1), 9.0)
