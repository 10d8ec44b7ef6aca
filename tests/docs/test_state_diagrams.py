"""The page of state machines, and its pictures, are what the tables of the core give."""

import dataclasses
import xml.etree.ElementTree as ET

import pytest

from scripts import state_diagrams
from torch_ps.ps.core.state_tables import MEMBER, TABLES, StateTable


def test_page_and_pictures_are_what_the_tables_give() -> None:
    old = [str(path) for path, text in state_diagrams.drawn().items() if path.read_text(encoding="utf-8") != text]
    assert old == [], "run python scripts/state_diagrams.py"


def test_no_picture_is_left_of_a_table_that_is_gone() -> None:
    there = {path.name for path in (state_diagrams.DOCS / "images").glob("states-*.svg")}
    assert there == {state_diagrams.picture(table) for table in TABLES}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_picture_has_a_box_for_each_state_and_an_arrow_for_each_pair(table: StateTable) -> None:
    drawn = ET.fromstring(state_diagrams.svg(table))
    texts = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    arrows = state_diagrams.arrows(table)
    assert sorted(filter(None, texts)) == sorted(
        [*table.states, *(call for calls in arrows.values() for call in calls)]
    )
    paths = [each for each in drawn.iter("{http://www.w3.org/2000/svg}path") if each.get("marker-end")]
    assert len(paths) == len(arrows)


def test_changed_table_changes_page_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    page = state_diagrams.page()
    other = dataclasses.replace(MEMBER, rows=MEMBER.rows - {("member", "tick", "away")})
    monkeypatch.setattr(state_diagrams, "TABLES", (other, *TABLES[1:]))
    assert state_diagrams.page() != page
    assert state_diagrams.svg(other) != state_diagrams.svg(MEMBER)
