"""Which job a model of this process takes."""

import gc
import os
from collections.abc import Iterator

import pytest

from torch_ps.common.errors import ConfigError
from torch_ps.common.wire.job_servers import JobServers, parse_jobs
from torch_ps.worker.runtime import jobs_here
from torch_ps.worker.runtime.jobs_here import choose_job, companions_of, enter_job, leave_job

TWO = parse_jobs("gen=a:1,a:2;critic=b:1")


class Model:
    """Stands for what an optimizer trains; it takes the place of what is equal to ``name``."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def replaced_by(self, other: "Model") -> bool:
        return bool(self.name) and self.name == other.name


class Member:
    """Stands for an optimizer."""

    def close(self) -> None:
        leave_job(self)


@pytest.fixture(autouse=True)
def _nobody_here() -> Iterator[None]:
    before = dict(jobs_here._taken)
    jobs_here._taken.clear()
    yield
    jobs_here._taken.clear()
    jobs_here._taken.update(before)


def entered(
    jobs: tuple[JobServers, ...], worker: str, job: str = "", model: str = "", *, own_name: bool = False
) -> tuple[Member, str]:
    member, trains = Member(), Model(model)
    chosen = choose_job(jobs, job, worker, own_name=own_name, trains=trains)
    enter_job(member, chosen, worker, own_name=own_name, trains=trains)
    return member, chosen.name


def test_the_kth_model_takes_the_kth_job_and_a_closed_one_gives_its_job_back() -> None:
    gen, first = entered(TWO, "w0")
    _critic, second = entered(TWO, "w0")
    assert (first, second) == ("gen", "critic")
    with pytest.raises(ConfigError, match=r"ps-run --models 3 or ps-serve --models NAME,NAME"):
        choose_job(TWO, "", "w0", own_name=False, trains=Model())
    leave_job(gen)
    assert entered(TWO, "w0")[1] == "gen"


def test_a_dropped_member_gives_its_job_back_although_it_is_in_a_circle() -> None:
    member, _ = entered(TWO[:1], "w0")
    member.itself = member  # type: ignore[attr-defined]
    gc.disable()
    try:
        del member
        assert choose_job(TWO[:1], "", "w0", own_name=False, trains=Model()).name == "gen"
    finally:
        gc.enable()


def test_a_job_is_taken_by_its_name() -> None:
    kept = [entered(TWO, "w0", "critic")]
    assert kept[0][1] == "critic"
    kept.append(entered(TWO, "w0"))
    assert kept[1][1] == "gen"
    with pytest.raises(ConfigError, match=r"another model in job critic as worker w0.* close\(\) on that first"):
        choose_job(TWO, "critic", "w0", own_name=False, trains=Model())
    with pytest.raises(ConfigError, match=r"no job 'actor' among the servers, which are those of gen, critic"):
        choose_job(TWO, "actor", "w0", own_name=False, trains=Model())
    with pytest.raises(ConfigError, match=r"no job 'gen' among the servers, which are those of one job without a name"):
        choose_job(parse_jobs("a:1"), "gen", "w0", own_name=False, trains=Model())


def test_a_made_up_name_is_no_reason_to_share_a_job_and_a_name_of_its_own_is() -> None:
    one = parse_jobs("a:1")
    _kept = entered(one, "host-1-abc")
    with pytest.raises(ConfigError, match="another model in the job at a:1 as worker host-1-abc"):
        choose_job(one, "", "host-1-def", own_name=False, trains=Model())
    assert choose_job(one, "", "w1", own_name=True, trains=Model()) == one[0]
    with pytest.raises(ConfigError, match="ps-run --models 2"):
        choose_job(one, "", "host-1-abc", own_name=True, trains=Model())


def test_the_jobs_of_a_parent_process_are_not_those_of_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    _kept = entered(TWO[:1], "w0")
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert choose_job(TWO[:1], "", "w0", own_name=False, trains=Model()).name == "gen"


def test_the_former_optimizer_of_a_model_is_closed_and_its_job_taken(caplog: pytest.LogCaptureFixture) -> None:
    _gen, _critic = entered(TWO, "w0", model="gen"), entered(TWO, "w0", model="critic")
    _again = entered(TWO, "w0", model="critic")
    assert _again[1] == "critic"
    assert "worker w0 of job critic is closed, as this process makes another optimizer in its place" in caplog.text
    with pytest.raises(ConfigError, match="another model in job gen as worker w0, job critic as worker w0"):
        choose_job(TWO, "", "w0", own_name=False, trains=Model("third"))


def test_companions_are_the_same_worker_in_other_jobs() -> None:
    pairs = [[entered(TWO, f"w{rank}", job, own_name=True)[0] for job in ("gen", "critic")] for rank in range(2)]
    assert companions_of(pairs[0][0]) == [pairs[0][1]]
    assert companions_of(pairs[1][1]) == [pairs[1][0]]
    leave_job(pairs[0][1])
    assert companions_of(pairs[0][0]) == []
    assert companions_of(Member()) == []


def test_workers_with_made_up_names_are_one_worker() -> None:
    gen, critic = (entered(TWO, f"host-1-{made_up}")[0] for made_up in "ab")
    assert companions_of(gen) == [critic]
