"""Many datasets: finished ones cost nothing, a standby gets changes only, and no worker can fill the lead's memory."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.core.job import member, roster
from torch_ps.common.errors import ProtocolError
from torch_ps.ps.core import dataset_register
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.dataset_register import MAX_OF_WORKER, MAX_UNREAD, merge_changes
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.sample_assigner import Over, Portion, SampleAssigner, SampleRequest

ASYNC = Mode(name="async")
BOTH = roster(2, member("a"), member("b", 2))
SESSIONS = {"a": 1, "b": 2}


def ask(worker: str, seed: int, *, size: int = 4, epochs: int = 1, **more: Any) -> SampleRequest:
    return SampleRequest(worker, SESSIONS[worker], DatasetSpec("", size, seed, True), size, epochs, 1 << 30, **more)


def read(data: SampleAssigner, worker: str, seed: int, step: int = 0, epochs: int = 1) -> int:
    """Read an epoch of four samples to its end; gives the number of the dataset."""
    portion = data.ask(ask(worker, seed, epochs=epochs), BOTH, 0)
    assert isinstance(portion, Portion)
    assert portion.epoch == epochs - 1
    data.claim(worker, SESSIONS[worker], step, ((portion.number, 4),))
    data.settle(worker, SESSIONS[worker], step, applied=True)
    assert isinstance(data.ask(ask(worker, seed, epochs=epochs), BOTH, 0), Over)
    return portion.number


def live(data: SampleAssigner) -> int:
    return len(data._register.live)


def test_dataset_that_is_over_is_forgotten_but_for_its_epochs() -> None:
    data = SampleAssigner(ASYNC)
    for seed in range(3 * MAX_OF_WORKER):  # a seed per epoch
        read(data, "a", seed)
    assert live(data) == 0
    assert isinstance(data.ask(ask("b", 7), BOTH, 0), Over)  # nobody trains on its samples again
    assert read(data, "b", 7, epochs=2) == 3 * MAX_OF_WORKER  # but another epoch may be had
    assert isinstance(data.ask(ask("a", 7, epochs=2), BOTH, 0), Over)


def test_repeat_that_speaks_of_a_dataset_which_was_over_changes_nothing() -> None:
    data = SampleAssigner(ASYNC)
    old = read(data, "a", 0)
    portion = data.ask(ask("a", 0, epochs=2), BOTH, 0)
    assert isinstance(portion, Portion)
    before = data.hand_over()
    data.check("a", 1, ((old, 4),))
    data.claim("a", 1, 0, ((old, 4),))
    data.settle("a", 1, 0, applied=False)
    assert data.hand_over() == {**before, "serial": before["serial"] + 1}
    late = replace(ask("a", 0, epochs=2), received=1000, number=old)  # what it has received of the former one
    assert data.ask(late, BOTH, 0) == portion  # of the present one it has received nothing


def test_worker_that_has_stopped_reading_is_not_waited_for_in_later_epochs_either() -> None:
    data = SampleAssigner(Mode())
    first = [data.ask(ask(worker, 0, size=8), BOTH, 0) for worker in ("b", "a")]
    assert any(isinstance(each, Portion) for each in first)
    data.give_back("b", 2, DatasetSpec("", 8, 0, True), 0)
    for epochs in (1, 2, 3):
        number, total = None, 0
        while isinstance(answer := data.ask(ask("a", 0, size=8, epochs=epochs), BOTH, 0), Portion):
            number, total = answer.number, total + sum(stop - start for start, stop in answer.ranges)
            data.claim("a", 1, epochs * 10 + total, ((number, 8),))
            data.settle("a", 1, epochs * 10 + total, applied=True)
        assert isinstance(answer, Over), answer


def test_one_worker_cannot_keep_the_others_from_their_data() -> None:
    data = SampleAssigner(ASYNC)
    for seed in range(MAX_OF_WORKER):
        assert isinstance(data.ask(ask("a", seed), BOTH, 0), Portion)
    with pytest.raises(ProtocolError, match=f"'a' asks for one more data set and has brought {MAX_OF_WORKER} that are"):
        data.ask(ask("a", MAX_OF_WORKER), BOTH, 0)
    read(data, "b", MAX_OF_WORKER + 1)
    data.keep({("b", 2)})
    assert live(data) == 0  # they go with the worker, as nothing of them is done


def test_progress_of_what_nobody_reads_is_kept_for_the_latest_datasets_only() -> None:
    data = SampleAssigner(ASYNC)
    for seed in range(MAX_UNREAD + 10):
        worker = "a" if seed % 2 else "b"
        portion = data.ask(replace(ask(worker, seed), batch=1), BOTH, 0)
        assert isinstance(portion, Portion)
        data.claim(worker, SESSIONS[worker], seed, ((portion.number, 1),))
        data.settle(worker, SESSIONS[worker], seed, applied=True)
    data.keep(set())
    kept = [each["seed"] for each in data.export()["sets"]]
    assert kept == list(range(10, MAX_UNREAD + 10))
    assert all(each["left"] == [[1, 4]] for each in data.export()["sets"])


def test_there_is_a_limit_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_register, "MAX_DATASETS", 3)
    data = SampleAssigner(ASYNC)
    for seed, worker in enumerate("aab"):
        data.ask(ask(worker, seed), BOTH, 0)
    with pytest.raises(ProtocolError, match="'b' asks for one more data set and is in a job with 3 that are not read"):
        data.ask(ask("b", 3), BOTH, 0)


def test_standby_is_told_what_has_changed_and_has_the_same() -> None:
    data = SampleAssigner(ASYNC)
    for seed in range(200):
        data.ask(ask("a", seed), BOTH, 0)
    state = json.loads(json.dumps(data.hand_over()))
    told = []
    for step in range(5):
        if step % 2:
            read(data, "b", 1000 + step, step)
        else:
            data.claim("a", 1, step, ((step, 4),))
            data.settle("a", 1, step, applied=True)
            data.ask(ask("a", step), BOTH, 0)
        told.append(json.loads(json.dumps(data.changes())))
    data.give_back("a", 1, DatasetSpec("", 4, 100, True), 0)
    data.keep({("b", 2)})
    told.append(json.loads(json.dumps(data.changes())))
    assert max(len(each["changed"]) for each in told[:-1]) <= 2
    for each in told:
        state = merge_changes(state, each)
        assert merge_changes(state, each) == state  # what was overtaken changes nothing
    standby = SampleAssigner(ASYNC)
    standby.take_over(state)
    assert standby.export() == data.export()
    assert standby.hand_over() == data.hand_over()


def test_standby_that_lacks_a_change_says_so() -> None:
    data = SampleAssigner(ASYNC)
    state = data.hand_over()
    data.changes()
    with pytest.raises(ValueError, match="change 3 of the data sets follows 1"):
        merge_changes(state, data.changes())


def test_nothing_is_noted_for_a_standby_that_is_not_there() -> None:
    data = SampleAssigner(ASYNC)
    for seed in range(10):
        read(data, "a", seed)
    assert not data._register._changed
    data.hand_over()
    read(data, "a", 10)
    assert data._register._changed
    data.track_none()
    read(data, "a", 11)
    assert not data._register._changed
