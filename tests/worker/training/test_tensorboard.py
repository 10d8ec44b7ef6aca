"""--tensorboard: event files that TensorBoard's own reader reads, with the figures of the events."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.launched import ends_well
from tests.docs.commands import shown
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.compare.run_process import PlannedRun, arguments
from torch_ps.compare.runs import parse_runs
from torch_ps.worker.commands import worker as cli
from torch_ps.worker.training import tensorboard as board


def scalars(folder: Path) -> dict[str, list[Any]]:
    """Every scalar in a folder, by name."""
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = reading.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: found.Scalars(name) for name in found.Tags()["scalars"]}


def test_a_job_writes_the_figures_of_its_events_for_every_worker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (command,) = shown("docs/observability.md", "ps-run -n 2 --task digits --samples 6400 --tensorboard runs/board")
    said = ends_well(tmp_path, command.replace("6400", "640"), PS_EVENTS="events", PS_EVALUATIONS="3")
    assert "validation: loss" in said
    for worker in ("w0", "w1"):
        lines = (tmp_path / "events" / f"{worker}.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        steps = [event for event in events if event["event"] == "step"]
        found = scalars(tmp_path / "runs/board" / worker)
        for name, fact in {
            "train/loss": "loss",
            "train/lr": "lr",
            "train/staleness": "staleness",
            "bytes/pushed": "pushed_bytes",
            "bytes/pulled": "pulled_bytes",
        }.items():
            assert [point.value for point in found[name]] == pytest.approx([step[fact] for step in steps], rel=1e-6)
            assert [point.step for point in found[name]] == [step["job_samples"] for step in steps]
        seconds = [after["time"] - before["time"] for before, after in pairwise(steps)]
        assert [point.value for point in found["time/step_seconds"]] == pytest.approx(seconds, rel=1e-4)
        assert len(found["time/samples_per_second"]) == len(found["time/wait_share"]) == len(steps) - 1
        evaluations = [event["metrics"]["accuracy"] for event in events if event["event"] == "evaluation"]
        drawn = [point.value for point in found.get("validation/accuracy", [])]
        assert drawn == pytest.approx(evaluations)
        assert bool(evaluations) == (worker == "w0")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'torch-ps\[tensorboard\]'"):
        cli.check(WorkerConfig(task="digits", tensorboard="runs/board"), ())
    board.check("")  # nobody has asked for it


def test_a_script_is_not_promised_what_it_would_not_get(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "train.py").write_text("")
    with pytest.raises(ConfigError, match="works with ready-made tasks only"):
        cli.check(WorkerConfig(tensorboard="board"), (str(tmp_path / "train.py"),))


@pytest.mark.parametrize(("seed", "place"), [(None, "sync-fp32"), (3, "sync-fp32/seed-3")])
def test_each_run_of_a_comparison_has_a_folder_of_its_own(tmp_path: Path, seed: int | None, place: str) -> None:
    plan, config = PlannedRun(parse_runs("sync")[0], 0.1, tmp_path, seed), CompareConfig(tensorboard="board")
    assert f"--tensorboard=board/{place}" in arguments(plan, config)
