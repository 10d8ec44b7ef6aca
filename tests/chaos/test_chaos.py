"""One seed of ``make chaos`` for a minute, whether its schedule is the seed's, and what its ledger finds."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.chaos import schedule
from tests.chaos.ledger import Ledger
from tests.chaos.run import chaos, table


def test_seed_gives_the_same_faults_again_and_all_kinds_come() -> None:
    def faults(seed: int, number: int) -> list[schedule.Round]:
        return list(islice(schedule.draw(seed, number)[1], 60))

    assert faults(7, 0) == faults(7, 0)
    assert faults(7, 0) != faults(8, 0)
    kinds = {fault.kind for number in range(6) for each in faults(7, number) for fault in each.faults}
    assert kinds == set(schedule.KINDS)


def ledger(folder: Path, *acks: tuple[float, int, list[int]], most: int = 1) -> Ledger:
    path = folder / "w0.acks"
    path.write_text("".join(json.dumps(ack) + "\n" for ack in acks))
    found = Ledger([path], 4, most)
    found.read()
    return found


def test_ledger_finds_an_acknowledged_sample_that_is_lost(tmp_path: Path) -> None:
    found = ledger(tmp_path, (1.0, 3, [0, 1]))
    found.check(torch.tensor([-1.0, -1.0, 0.0, 0.0]))
    with pytest.raises(AssertionError, match="1 acknowledged samples are lost"):
        found.check(torch.tensor([-1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(("most", "doubled"), [(1, -2.0), (4, -1 / 4 - 1 / 3), (4, -1 / 5)])
def test_ledger_finds_a_sample_that_is_doubled(most: int, doubled: float, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not trained on once"):
        ledger(tmp_path, most=most).check(torch.tensor([0.0, doubled, 0.0, 0.0]))


def test_ledger_asks_after_a_restart_for_what_the_checkpoint_has(tmp_path: Path) -> None:
    found = ledger(tmp_path, (1.0, 3, [0]), (2.0, 5, [1]))
    found.went_back(killed=3.0, version=4)
    assert found.required == {0: 3}
    assert found.num_taken_back == 1
    with pytest.raises(AssertionError, match="are lost"):
        found.check(torch.tensor([0.0, 0.0, 0.0, 0.0]))


@pytest.mark.tier("all")
def test_a_minute_of_random_faults_loses_doubles_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    # Three shards and a data set per epoch: what many users run, and what a draw leaves out.
    found = chaos(
        seed=7, seconds=60.0, num_shards=3, data_sets=5, size=2500, patience=60.0
    )  # timing never decides here; it does in make chaos
    assert sum(found.faults.values()) >= 5
    assert "0 lost, 0 doubled" in table(found)
    assert "all go on after" in capsys.readouterr().out
