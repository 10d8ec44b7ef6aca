"""The examples in the docstrings of the core run as they are written, and name calls and effects that exist."""

from __future__ import annotations

import doctest
import re
from types import ModuleType
from typing import get_args

import pytest

from torch_ps.ps import core
from torch_ps.ps.core import failover
from torch_ps.ps.core.consistent_cut import CutPlanner
from torch_ps.ps.core.effects import Effect
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Decision
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.core.sample_assigner import SampleAssigner
from torch_ps.ps.core.shard import Shard


@pytest.mark.parametrize("module", [core, failover], ids=lambda module: module.__name__)
def test_example_says_what_the_core_says(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 10
    assert found.failed == 0


@pytest.mark.parametrize(("module", "union"), [(core, Effect), (failover, Decision)], ids=["effects", "decisions"])
def test_every_effect_is_explained(module: ModuleType, union: object) -> None:
    names = [each.__name__ for each in get_args(union)]
    assert [name for name in names if not re.search(rf"``{name}\b", str(module.__doc__))] == []


def test_calls_that_are_named_exist() -> None:
    machines = {each.__name__: each for each in (Shard, Membership, SampleAssigner, CutPlanner, Incarnation)}
    named = re.findall(r"``(\w+)\.(\w+)[`(]", str(core.__doc__))
    mine = [(machine, call) for machine, call in named if machine in machines]
    assert len(mine) > 10
    assert [f"{m}.{c}" for m, c in mine if c != "cut" and not hasattr(machines[m], c)] == []


def test_calls_of_a_seat_are_named() -> None:
    text = str(failover.__doc__)
    calls = {name for seat in (ElectedSeat, LeasedSeat) for name in vars(seat) | vars(seat.__mro__[1])}
    calls = {name for name in calls if not name.startswith("_") and callable(getattr(ElectedSeat, name, None))}
    properties = {"at", "may_follow"}  # questions, and the time of the next call
    assert {name for name in calls - properties if f"``{name}``" not in text} == set()
