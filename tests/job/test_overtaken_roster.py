"""A roster that a newer one overtakes while it comes into force does not come into force after it."""

import dataclasses

import pytest

from tests.fuzz.whole_job import WholeJob
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.engine.engine import Engine


def test_roster_that_is_overtaken_by_what_the_engine_sends_is_published_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = WholeJob(1, "sync", "SGD", clips=True)
    job = whole.server.parts.job
    older = dataclasses.replace(job.roster, epoch=job.roster.epoch + 1)
    newer = dataclasses.replace(job.roster, epoch=job.roster.epoch + 2)
    set_roster = Engine.set_roster

    def overtaken(self: Engine, roster: Roster) -> None:
        set_roster(self, roster)
        if roster is older:  # an answer that leaves lets the lead's next roster in
            job._put_in_force(newer)

    monkeypatch.setattr(Engine, "set_roster", overtaken)
    with job.rosters.watch() as queue:
        assert queue.get_nowait() is not None
        job._put_in_force(older)
        assert queue.get_nowait() is newer
        assert queue.empty()
    assert job.roster is newer
    whole.close()
