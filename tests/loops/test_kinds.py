"""Every kind of loops is what plain torch makes of it, bit for bit after each line, or an error says why not.

Over shared memory with the options that a worker has by default, and once more with a plane, an overlap and a number of
workers that go round; ``python -m tests.loops.matrix`` runs all of them with all.
"""

import re
from pathlib import Path

import pytest

from tests.loops.registry import Kind, listed, load
from tests.loops.served import OVERLAPS, PLANES, compare
from tests.support.pairwise import pairwise

#: A script may be warned, as of a gradient with other strides, or where a compiled model waits for its parameters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KINDS = list(load().values())
#: Each pair of a plane, an overlap and a number of workers.
CELLS = pairwise(PLANES, OVERLAPS, (1, 2))
DEFAULT = ("memory", "auto")
TESTING = Path(__file__).parents[2] / "docs" / "testing.md"


def cell_of(number: int, kind: Kind) -> tuple[str, str, int]:
    """The plane, overlap and number of workers that a kind is run with beside the default ones."""
    able = [
        (plane, overlap, num_workers)
        for plane, overlap, num_workers in CELLS
        if num_workers in kind.workers and kind.is_for(overlap) and (plane, overlap) != DEFAULT
    ]
    return able[number % len(able)]


def check(kind: Kind, found: str, overlap: str) -> None:
    words = kind.refused or kind.refused_with.get(overlap, "")
    if words:
        assert re.match(f"refused: .*{words}", found), found
    else:
        assert found == "equal"


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_by_default_a_loop_is_what_plain_torch_makes_of_it(kind: Kind) -> None:
    check(kind, compare(kind, *DEFAULT, kind.workers[0]), "auto")


@pytest.mark.tier("all")
@pytest.mark.parametrize("number", range(len(KINDS)), ids=[kind.name for kind in KINDS])
def test_plane_overlap_and_workers_make_no_difference(number: int) -> None:
    kind = KINDS[number]
    plane, overlap, num_workers = cell_of(number, kind)
    check(kind, compare(kind, plane, overlap, num_workers, shards=1 + number % 2), overlap)


def test_documentation_has_the_kinds() -> None:
    assert listed() in TESTING.read_text(encoding="utf-8")
