"""Which samples are whose: dealt in rank order, done when a push of theirs is applied, given again when it is not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.core.job import covering, member, push, roster, trace
from torch_ps.common.errors import ProtocolError, UnknownWorker
from torch_ps.ps.core.consistent_cut import Sections
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.core.sample_assigner import Idle, Later, Over, Portion, SampleAssigner, SampleRequest, SampleResponse
from torch_ps.ps.core.shard import Shard

SET = DatasetSpec("", 40, 0, True)
ALL = 1 << 60  # a worker that has received whatever it was given
SYNC = Roster(2, (member("a", 1), member("b", 2)), True)


def ask(
    worker: str = "a", *, batch: int = 4, epochs: int = 1, size: int = 40, name: str = "", session: int = 0
) -> SampleRequest:
    return SampleRequest(
        worker, session or {"a": 1, "b": 2}.get(worker, 3), DatasetSpec(name, size, 0, True), batch, epochs, ALL
    )


def positions(answer: SampleResponse) -> list[int]:
    assert isinstance(answer, Portion), answer
    return [p for start, stop in answer.ranges for p in range(start, stop)]


def registered(mode: str = "sync", **of: Any) -> SampleAssigner:
    """Both have asked; in sync mode the first time says that the other one is waited for."""
    data = SampleAssigner(Mode(name=mode))
    if mode == "sync":
        assert isinstance(data.ask(ask("a", **of), SYNC, 0), Later)
    return data


def test_in_step_batch_k_of_all_is_batch_k_of_one_process() -> None:
    data = registered(batch=4, size=80)
    b = positions(data.ask(ask("b", size=80), SYNC, 0))
    a = positions(data.ask(ask("a", size=80), SYNC, 0))
    assert a == [0, 1, 2, 3, 8, 9, 10, 11]
    assert b == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize("first", ["a", "b"])
def test_in_step_who_gets_what_does_not_depend_on_who_asks_first(first: str) -> None:
    data = registered(batch=3)
    got: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(9):
        for worker in (first, {"a": "b", "b": "a"}[first]):
            answer = data.ask(ask(worker, batch=3), SYNC, 0)
            if isinstance(answer, Portion):
                got[worker] += positions(answer)
    assert got["a"][:6] == [0, 1, 2, 6, 7, 8]
    assert got["b"][:6] == [3, 4, 5, 9, 10, 11]
    assert sorted(got["a"] + got["b"]) == list(range(40))
    assert (len(got["a"]), len(got["b"])) == (20, 20)


def test_in_step_the_last_batch_is_shared_so_that_all_end_together() -> None:
    data = registered(batch=4, size=10)
    assert positions(data.ask(ask("b", size=10), SYNC, 0)) == [4, 5, 6, 7]
    assert positions(data.ask(ask("a", size=10), SYNC, 0)) == [0, 1, 2, 3]
    assert positions(data.ask(ask("a", size=10), SYNC, 0)) == [8]
    assert positions(data.ask(ask("b", size=10), SYNC, 0)) == [9]


def test_batches_of_two_sizes_take_parts_of_two_sizes() -> None:
    data = registered(batch=2, size=36)
    assert positions(data.ask(ask("b", batch=6, size=36), SYNC, 0)) == [2, 3, 4, 5, 6, 7]
    assert positions(data.ask(ask("a", batch=2, size=36), SYNC, 0)) == [0, 1]


def test_without_steps_whoever_asks_is_served_and_the_last_portions_are_small() -> None:
    data, sizes = SampleAssigner(Mode(name="async")), []
    while isinstance(answer := data.ask(ask("a", batch=2), SYNC, 0), Portion):
        sizes.append(len(positions(answer)))
    assert sum(sizes) == 40
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 2
    assert answer == Later(
        ("a",), "the last 40 samples of epoch 0 of the data set of 40 samples with seed 0 are with a"
    )


def test_in_step_everyone_has_to_ask_before_the_first_is_served() -> None:
    data = SampleAssigner(Mode())
    answer = data.ask(ask("a"), SYNC, 0)
    assert isinstance(answer, Later)
    assert answer.waiting_for == ("b",)
    assert answer.reason.endswith("is dealt to all at once, and b has not asked for it")
    closed = data.ask(ask("a"), Roster(1, (member("a"),), False), 0)
    assert isinstance(closed, Later)
    assert closed.reason == "the data is dealt when the first workers are complete; a joined"


@pytest.mark.parametrize("first", ["a", "b"])
def test_in_step_a_loop_over_epochs_gets_the_same_in_each_of_them_whoever_is_first(first: str) -> None:
    """A worker that asks for one more epoch at a time waits for the others to have asked for it too."""
    data, other = SampleAssigner(Mode()), {"a": "b", "b": "a"}[first]
    for epoch in range(3):
        got: dict[str, list[int]] = {"a": [], "b": []}
        number = -1
        assert isinstance(data.ask(ask(first, size=16, epochs=epoch + 1), SYNC, 0), Later)
        for worker in (other, first, other):
            while isinstance(answer := data.ask(ask(worker, size=16, epochs=epoch + 1), SYNC, 0), Portion):
                got[worker] += positions(answer)
                number = answer.number
        assert got == {"a": [0, 1, 2, 3, 8, 9, 10, 11], "b": [4, 5, 6, 7, 12, 13, 14, 15]}
        for worker, session in (("a", 1), ("b", 2)):
            data.claim(worker, session, epoch, ((number, 8),))
            data.settle(worker, session, epoch, applied=True)
        for worker in (first, other):
            assert isinstance(data.ask(ask(worker, size=16, epochs=epoch + 1), SYNC, 0), Over)


def test_in_step_an_epoch_does_not_wait_for_a_worker_that_broke_off() -> None:
    data = registered(size=8)
    positions(data.ask(ask("b", size=8), SYNC, 0))
    data.give_back("b", 2, ask(size=8).data, 0)
    for epoch in range(2):
        while isinstance(data.ask(ask("a", size=8, epochs=2), SYNC, 0), Portion):
            pass
        data.claim("a", 1, epoch, ((0, 8 * (epoch + 1)),))
        data.settle("a", 1, epoch, applied=True)
    assert isinstance(data.ask(ask("a", size=8, epochs=2), SYNC, 0), Over)


def test_in_step_the_end_together_waits_until_every_reader_has_asked_after_its_last_samples() -> None:
    data = registered(size=5, batch=4)
    together = {worker: replace(ask(worker, size=5), together=True) for worker in "ab"}
    for worker, session in (("b", 2), ("a", 1)):
        part = positions(data.ask(together[worker], SYNC, 0))
        data.claim(worker, session, 0, ((0, len(part)),))
        data.settle(worker, session, 0, applied=True)
    restored = SampleAssigner(Mode())
    restored.take_over(json.loads(json.dumps(data.hand_over())))
    for each in (data, restored):
        late = each.ask(together["a"], SYNC, 1)
        assert isinstance(late, Later)
        assert late.waiting_for == ("b",)
        assert late.reason.endswith("end for all at once, and not yet for b")
        assert isinstance(each.ask(ask("a", size=5), SYNC, 1), Over)  # a worker that does not ask for it
    again = SampleAssigner(Mode())
    again.take_over(json.loads(json.dumps(data.hand_over())))
    for each in (data, again):
        assert isinstance(each.ask(together["b"], SYNC, 1), Over)
        assert isinstance(each.ask(together["a"], SYNC, 1), Over)


@pytest.mark.parametrize("gone", ["left", "broke off", "no steps"])
def test_the_end_together_does_not_wait_for(gone: str) -> None:
    data = registered("async" if gone == "no steps" else "sync", size=5)
    for worker, session, batch in (("b", 2, 4), ("a", 1, 4)):
        part = positions(data.ask(ask(worker, size=5, batch=batch), SYNC, 0))
        data.claim(worker, session, 0, ((0, len(part)),))
        data.settle(worker, session, 0, applied=True)
    if gone == "broke off":
        data.give_back("b", 2, ask(size=5).data, 5)
    members = SYNC if gone != "left" else Roster(3, SYNC.members[:1], True)
    assert isinstance(data.ask(replace(ask("a", size=5), together=True), members, 1), Over)


def test_newcomer_is_not_waited_for_before_its_first_step() -> None:
    data = registered()
    later = Roster(3, (*SYNC.members, member("c", 3, first_step=8)), True)
    assert isinstance(data.ask(ask("b"), later, 7), Portion)
    data.ask(ask("a"), later, 7)
    assert isinstance(data.ask(ask("a"), later, 8), Later)
    assert isinstance(data.ask(ask("c"), later, 8), Portion)


@pytest.mark.parametrize(("mode", "answer"), [("sync", Idle), ("ssp", Idle), ("async", Later)])
def test_worker_without_samples_takes_part_with_weight_0_where_others_wait_for_it(mode: str, answer: type) -> None:
    data = SampleAssigner(Mode(name=mode, slack=1 if mode == "ssp" else 0))
    data.ask(ask("a", size=1), SYNC, 0)
    data.ask(ask("b", size=1), SYNC, 0)
    found = [data.ask(ask(w, size=1), SYNC, 0) for w in ("a", "b")]
    assert any(isinstance(each, answer) for each in found)
    assert not any(isinstance(each, Over) for each in found)


def one(mode: str = "async", size: int = 8) -> tuple[SampleAssigner, Shard]:
    data = SampleAssigner(Mode(name=mode))
    core = Shard(buckets=2, mode=Mode(name=mode), data=data)
    core.set_roster(roster(1, member("a")))
    assert len(positions(core.request_samples(ask("a", batch=4, size=size)))) == 4
    return data, core


def left(data: SampleAssigner) -> list[list[int]]:
    (found,) = data.export()["sets"]
    ranges: list[list[int]] = found["left"]
    return ranges


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_samples_are_done_when_their_push_is_applied_to_the_first_bucket(mode: str) -> None:
    data, core = one(mode)
    core.push(covering(push("a", bucket=1), 4))
    assert left(data) == [[0, 8]]
    core.push(covering(push("a"), 3))
    assert left(data) == [[3, 8]]


def test_repeat_covers_nothing_twice() -> None:
    data, core = one()
    for _ in range(3):
        core.push(covering(push("a"), 2))
    assert left(data) == [[2, 8]]
    core.push(covering(push("a", 1), 4))
    assert left(data) == [[4, 8]]


def test_push_that_is_dropped_gives_its_samples_back() -> None:
    data = SampleAssigner(Mode(name="async"))
    core = Shard(buckets=1, mode=Mode(name="async", max_staleness=0), data=data)
    core.set_roster(roster(1, member("a"), member("b")))
    core.request_samples(ask("a", size=8))
    core.push(push("b"))
    core.push(covering(push("a", base=0), 4))
    assert left(data) == [[0, 8]]
    assert positions(core.request_samples(ask("a", size=8))) == [0, 1, 2, 3]


def test_step_that_its_worker_leaves_before_it_closes_gives_its_samples_back() -> None:
    data = SampleAssigner(Mode())
    core = Shard(buckets=1, mode=Mode(), data=data)
    core.set_roster(SYNC)
    core.request_samples(ask("a", size=8))
    assert positions(core.request_samples(ask("b", size=8))) == [4, 5, 6, 7]
    assert positions(core.request_samples(ask("a", size=8))) == [0, 1, 2, 3]
    core.push(covering(push("a"), 4))
    core.set_roster(roster(3, member("b", 2)))
    assert left(data) == [[0, 8]]
    core.push(covering(push("b", session=2), 4))
    assert left(data) == [[0, 4]]
    assert positions(core.request_samples(ask("b", size=8))) == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_portion_whose_answer_was_lost_is_said_again(mode: str) -> None:
    data = registered(mode)
    data.ask(ask("b"), SYNC, 0)
    first = data.ask(replace(ask("a"), received=0), SYNC, 0)
    received = len(positions(first))
    lost = data.ask(replace(ask("a"), received=received), SYNC, 0)
    assert positions(data.ask(replace(ask("a"), received=received), SYNC, 0)) == positions(lost)
    received += len(positions(lost))
    fresh = positions(data.ask(replace(ask("a"), received=received), SYNC, 0))
    assert not {*fresh} & {*positions(lost), *positions(first)}


def test_what_is_given_back_goes_to_others() -> None:
    data = registered("async")
    first = positions(data.ask(ask("a"), SYNC, 0))
    data.give_back("a", 1, SET, 0)
    assert positions(data.ask(ask("b"), SYNC, 0))[: len(first)] == first


def test_what_is_kept_is_not_given_to_others_nor_what_an_open_push_covers() -> None:
    data = SampleAssigner(Mode())
    core = Shard(buckets=1, mode=Mode(), data=data)
    core.set_roster(SYNC)
    core.request_samples(ask("a", size=80))
    assert positions(core.request_samples(ask("b", size=80))) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert positions(core.request_samples(ask("a", size=80))) == [0, 1, 2, 3, 8, 9, 10, 11]
    core.push(covering(push("a"), 3))
    core.return_samples("a", 1, replace(SET, size=80), 2)  # its open push covers 3
    core.push(covering(push("b", session=2), 8))
    assert left(data) == [[3, 4], [8, 12], [16, 80]]
    assert positions(core.request_samples(ask("b", size=80)))[:4] == [3, 8, 9, 10]


def test_next_epoch_begins_when_every_sample_of_this_one_is_done() -> None:
    data, core = one(size=4)
    answer = core.request_samples(ask("a", size=4, epochs=2))
    assert isinstance(answer, Later)
    core.push(covering(push("a"), 4))
    again = core.request_samples(ask("a", size=4, epochs=2))
    assert isinstance(again, Portion)
    assert (again.epoch, again.ranges) == (1, ((0, 4),))
    core.push(covering(push("a", 1), 8))
    assert core.request_samples(ask("a", size=4, epochs=2)) == Over(
        "2 epochs of the data set of 4 samples with seed 0 are over"
    )
    assert left(data) == []


REFUSED = [
    (ask(size=0), "impossible data set"),
    (ask(name="x" * 101), "impossible data set"),
    (ask(batch=0), "must be >= 1; got 0 and 1"),
    (ask(epochs=0), "must be >= 1; got 4 and 0"),
]


@pytest.mark.parametrize(("bad", "says"), REFUSED)
def test_refused_ask_leaves_no_trace(bad: SampleRequest, says: str) -> None:
    data, core = one()
    before = trace(data)
    with pytest.raises(ProtocolError, match=says):
        core.request_samples(bad)
    with pytest.raises(UnknownWorker, match="join again"):
        core.request_samples(ask("b"))
    assert trace(data) == before


@pytest.mark.parametrize(("number", "samples"), [(0, 5), (1, 1), (99, 0)])
def test_push_that_covers_what_was_not_given_is_refused(number: int, samples: int) -> None:
    _, core = one()
    before = trace(core)
    with pytest.raises(ProtocolError, match="it was given"):
        core.push(covering(push("a"), samples, number))
    assert trace(core) == before


def test_only_the_lead_gives_out_data() -> None:
    core = Shard(buckets=1, mode=Mode())
    with pytest.raises(ProtocolError, match="ask the lead, shard 0"):
        core.request_samples(ask())


def test_state_goes_through_json_and_the_run_goes_on_as_if_it_had_not_stopped() -> None:
    whole, half = in_step(steps=99), in_step(steps=3)
    resumed = SampleAssigner(Mode())
    resumed.restore(json.loads(json.dumps(half[0].export())))
    assert half[1] + in_step(steps=99, data=resumed)[1] == whole[1]


def in_step(steps: int, data: SampleAssigner | None = None) -> tuple[SampleAssigner, list[tuple[str, list[int]]]]:
    """Two epochs by two workers with batches of 3 and 5; what each push covers, in order."""
    data = data or SampleAssigner(Mode())
    core = Shard(buckets=1, mode=Mode(), data=data)
    core.set_roster(SYNC)
    have: dict[str, list[int]] = {"a": [], "b": []}
    begun, log, sizes, over = Counter[str](), [], {"a": 3, "b": 5}, set[str]()
    for step in range(steps):
        taken: dict[str, list[int]] = {"a": [], "b": []}
        for _ in range(2):
            for worker, session in (("a", 1), ("b", 2)):
                if not have[worker] and not taken[worker]:
                    answer = core.request_samples(ask(worker, batch=sizes[worker], epochs=2, size=45, session=session))
                    if isinstance(answer, Portion):
                        have[worker] = positions(answer)
                    elif isinstance(answer, Over):
                        over.add(worker)
                if not taken[worker]:
                    taken[worker], have[worker] = have[worker][: sizes[worker]], have[worker][sizes[worker] :]
        if over == {"a", "b"}:
            break
        for worker, session in (("a", 1), ("b", 2)):
            begun[worker] += len(taken[worker])
            log.append((worker, taken[worker]))
            core.push(covering(push(worker, step, session=session), begun[worker]))
    return data, log


BAD_STATES: list[dict[str, Any]] = [
    {},
    {"sets": [{"name": "", "size": 4, "seed": 0, "shuffled": True, "epoch": 0}]},
    {"sets": [{"name": "", "size": 4, "seed": 0, "shuffled": True, "epoch": 0, "left": [[0, 5]]}]},
    {"sets": [{"name": "", "size": 4, "seed": 0, "shuffled": True, "epoch": 0, "left": [[2, 4], [0, 1]]}]},
    {"sets": [{"name": "", "size": "x", "seed": 0, "shuffled": True, "epoch": 0, "left": []}]},
]


@pytest.mark.parametrize("state", BAD_STATES)
def test_state_that_export_would_not_give_is_refused(state: dict[str, Any]) -> None:
    data, _ = one()
    before = trace(data)
    with pytest.raises((KeyError, TypeError, ValueError)):
        data.restore(state)
    assert trace(data) == before


def test_cut_keeps_what_was_done_when_its_first_bucket_passed_whatever_comes_before_its_last() -> None:
    mode = Mode(name="async")
    data, sections = SampleAssigner(mode), Sections()
    sections.add("data", data)
    shard = Shard(buckets=2, mode=mode, sections=sections, data=data)
    shard.set_roster(Roster(2, (Member("w0", 1, 0, 0), Member("w1", 2, 1, 0)), True, 1))
    for worker, session in (("w0", 1), ("w1", 2)):
        shard.request_samples(SampleRequest(worker, session, DatasetSpec("", 40, 0, False), 4, 1, 0))
        shard.push(Push(worker, session, 0, 0, 0, 1.0, 2, ((0, 4),)))
    assert sum(stop - start for start, stop in data.export()["sets"][0]["left"]) == 32
    shard.push(Push("w0", 1, 0, 1, 0, 1.0, 2))
    version, taken = shard.cut.taken
    assert version == 1
    assert sum(stop - start for start, stop in taken["data"]["sets"][0]["left"]) == 36


def test_session_of_before_the_restart_is_told_to_join_again_whether_it_asks_or_pushes() -> None:
    data = SampleAssigner(Mode(name="async"))
    data.begin_after(5)
    roster = Roster(6, (Member("w0", 5, 0, 0), Member("w1", 6, 1, 0)), True)
    old = SampleRequest("w0", 5, DatasetSpec("", 40, 0, False), 4, 1, 0)
    with pytest.raises(UnknownWorker, match="join again"):
        data.ask(old, roster, 0)
    with pytest.raises(UnknownWorker, match="join again"):
        data.check("w0", 5, ((0, 4),))
    data.check("w0", 5, ())
    assert isinstance(data.ask(SampleRequest("w1", 6, old.data, 4, 1, 0), roster, 0), Portion)
