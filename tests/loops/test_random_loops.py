"""Some random loops of ``make loops``, and whether a loop that differs is found, shortened and shown."""

import pytest

from tests.loops.random_loops import MOST_REFUSED, Setting, draw, run, search, shrunk

#: torch says so where a loop replaces a gradient by one with other strides.
pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")


@pytest.mark.tier("all")
@pytest.mark.parametrize("first", [0, 12, 24, 36])
def test_random_loops_are_what_plain_torch_makes_of_them(first: int) -> None:
    found = search(seed=7, seconds=120.0, first=first, most=12)
    assert found.different == []
    assert found.num_loops == 12
    assert found.count["refused"] <= max(MOST_REFUSED * found.num_loops, 1), found.words


def test_loop_that_differs_is_shortened_to_the_line_that_does_it() -> None:
    # Whether plain torch runs a loop is what it tells: so only a worker takes the step that makes the difference.
    lines = (*draw(7, 0).lines[:6], "r.is_plain or r.model.zero_grad(set_to_none=True)", "step(r)", "clip(r, 0.1)")
    planted = Setting("planted", "mlp", "SGD", "network", "off", 1, ("forward(r, 0, 3)", "backward(r, 0)", *lines))
    short = shrunk(planted, lambda what: what.startswith("after"))
    assert run(short).startswith("after")
    assert len(short.lines) <= 4
    assert "r.is_plain or r.model.zero_grad(set_to_none=True)" in short.source
