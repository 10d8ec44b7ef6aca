"""The record of what was applied: one entry per live worker, plain data on request."""

from __future__ import annotations

import json

from torch_ps.ps.core.effects import Contribution
from torch_ps.ps.core.ledger import Entry, Ledger, drop_entries, merge_progress


def progress() -> Ledger:
    p = Ledger(3)
    p.apply((Contribution("a", 1, 0, 2.0, 0), Contribution("b", 2, 0, 1.5, 0)), "why")
    p.apply((Contribution("a", 1, 1, 2.0, 1),), "why")
    return p


def test_apply_advances_version_samples_and_entries_together() -> None:
    p = progress()
    assert (p.version, p.num_pushes, p.samples, p.contributors) == (2, 3, 5.5, ("a",))
    assert p.entry("a", 1) == Entry(1, 1, 1)
    assert p.entry("b", 2) == Entry(2, 0, 0)


def test_entry_belongs_to_a_session() -> None:
    assert progress().entry("a", 2) is None


def test_entries_end_with_their_sessions() -> None:
    p = progress()
    p.keep({("a", 1), ("b", 3)})
    assert p.entry("a", 1) is not None
    assert p.entry("b", 2) is None


def test_standby_is_told_what_is_new_and_has_the_same_ledger() -> None:
    p = progress()
    p.apply(tuple(Contribution(f"w{number}", 3, 0, 1.0, 0) for number in range(100)), "why")
    had = json.loads(json.dumps(p.replicate()))
    p.refuse("b", 2, 1, 5)
    for step in (2, 3):
        told = p.apply((Contribution("a", 1, step, 1.0, 0),), "why").progress
        assert told is not None
        assert set(told["ledger"]) == ({"a", "b"} if step == 2 else {"a"})
        had = merge_progress(had, json.loads(json.dumps(told)))
    assert had == p.as_dict()
    p.keep({("a", 1)})
    assert drop_entries(had, {"a": 1, "b": 9}) == p.as_dict()
    p.replicate_none()
    assert p.apply((Contribution("a", 1, 4, 1.0, 0),), "why").progress is None


def test_ledger_survives_json() -> None:
    p = progress()
    again = Ledger(3)
    again.restore(json.loads(json.dumps(p.as_dict())))
    assert vars(again) == vars(p)
