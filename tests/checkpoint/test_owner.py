"""Whose a checkpoint folder is: what the record of it says, and what another job concludes from it."""

import dataclasses

import pytest

from torch_ps.common.errors import CheckpointError
from torch_ps.ps.checkpoint.owner import Owner, Verdict, dump, parse, verdict

FIRST = Owner(
    job="",
    incarnation=1,
    token="a",
    host="node1",
    address="10.0.0.1:5000",
    machine="boot/1",
    pid=7,
    ticks=100,
    since=0,
)
SECOND = dataclasses.replace(FIRST, incarnation=2, token="b", address="10.0.0.1:6000", pid=8)
ELSEWHERE = dataclasses.replace(SECOND, host="node2", address="10.0.0.2:5000")


def named(name: str, owner: Owner = FIRST, *, ended: bool = False) -> Owner:
    return dataclasses.replace(owner, job=name, ended=ended)


@pytest.mark.parametrize(
    ("found", "mine", "alive", "decided"),
    [
        (None, SECOND, False, Verdict.TAKE),
        (FIRST, SECOND, True, Verdict.REFUSE),
        (FIRST, SECOND, False, Verdict.TAKE),
        (FIRST, ELSEWHERE, None, Verdict.WATCH),
        (named("", ended=True), ELSEWHERE, None, Verdict.TAKE),
        # Containers of two machines may have one host name and one address.
        (FIRST, dataclasses.replace(SECOND, address=FIRST.address), None, Verdict.WATCH),
        # A standby of the same start takes over from a primary that may live.
        (FIRST, dataclasses.replace(ELSEWHERE, incarnation=1), True, Verdict.TAKE),
        (named("gen"), named("critic", SECOND), False, Verdict.REFUSE),
        (named("gen", ended=True), named("critic", SECOND), False, Verdict.REFUSE),
        (named("gen", ended=True), named("gen", SECOND), False, Verdict.TAKE),
        (named("gen", ended=True), SECOND, False, Verdict.TAKE),
    ],
)
def test_a_job_takes_watches_or_leaves_the_folder(
    found: Owner | None, mine: Owner, alive: bool | None, decided: Verdict
) -> None:
    assert verdict(found, mine, alive=alive) is decided


def test_record_is_read_back_and_says_whose_the_folder_is() -> None:
    assert parse(dump(named("gen")), "ck/owner.json") == named("gen")
    said = "job 'gen', server 10.0.0.1:5000, process 7 on host node1, since 1970-01-01T00:00:00Z"
    assert str(named("gen")) == said


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", dump(FIRST)[:-9], dump(FIRST).replace(b"owner 1", b"owner 2"), b"[" * 99_999]
    + [dump(FIRST).replace(b'"since": 0', b'"since": 1' + 40 * b"0")]
    + [dump(FIRST).replace(b'"pid": 7', each) for each in (b'"pid": "7"', b'"pid": true', b'"pit": 7')],
)
def test_record_that_cannot_be_read_is_no_free_folder(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"ck/owner\.json does not say whose these checkpoints are"):
        parse(data, "ck/owner.json")
