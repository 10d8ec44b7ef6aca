"""Several seeds of one configuration: means, and how far the seeds lie apart, from the command to the report."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.compare import synthetic
from tests.compare.golden import golden
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare import cli, results
from torch_ps.compare.results import RunResult
from torch_ps.compare.seeds import merge_seeds


def shifted(run: RunResult, by: float) -> RunResult:
    """The same run with every loss higher, and slower by as many seconds."""
    curve = [replace(point, loss=(point.loss or 0) + by, seconds=point.seconds + by) for point in run.curve]
    return replace(run, curve=curve, validation_loss=(run.validation_loss or 0) + by, seconds=run.seconds + by)


def test_figures_are_means_and_ranges_reach_from_the_lowest_to_the_highest() -> None:
    first = golden().runs[0]
    joined = merge_seeds([first, shifted(first, 0.5), shifted(first, 1.0)], [7, 8, 9])
    assert joined.seeds == [7, 8, 9]
    assert joined.command.splitlines() == 3 * [first.command]
    assert joined.validation_loss == pytest.approx((first.validation_loss or 0) + 0.5)
    assert joined.seconds == pytest.approx(first.seconds + 0.5)
    assert joined.spread is not None
    span = joined.spread.validation_loss
    assert span is not None
    assert (span.low, span.high) == pytest.approx((first.validation_loss or 0, (first.validation_loss or 0) + 1.0))
    for before, point in zip(first.curve, joined.curve, strict=True):
        assert point.loss_range is not None
        reach = [point.loss_range.low, point.loss or 0, point.loss_range.high]
        assert reach == pytest.approx([(before.loss or 0) + by for by in (0, 0.5, 1.0)])
        assert point.samples == before.samples
    counts = {value: 3 * count for value, count in first.staleness.histogram.items()}
    assert joined.staleness.histogram == counts


def test_seeds_that_were_measured_at_other_samples_are_compared_at_the_same_ones() -> None:
    """All losses lie on one line over the samples, so no seed differs from another, however many points it has."""
    run = golden().runs[0]
    line = [replace(p, samples=100 * i, loss=5 - 0.1 * i, accuracy=None) for i, p in enumerate(run.curve)]
    sparse = [line[0], *[replace(p, samples=p.samples + 50, loss=(p.loss or 0) - 0.05) for p in line[2:-2:2]], line[-1]]
    joined = merge_seeds([replace(run, curve=line), replace(run, curve=sparse)], [0, 1])
    assert [point.samples for point in joined.curve] == [point.samples for point in line]
    for before, point in zip(line, joined.curve, strict=True):
        assert point.loss_range is not None
        assert point.loss_range.high - point.loss_range.low == pytest.approx(0, abs=1e-9)
        assert point.loss == pytest.approx(before.loss)


def test_a_single_seed_is_given_back_as_it_is() -> None:
    first = golden().runs[0]
    assert merge_seeds([first], [0]) is first


def test_what_one_seed_lacks_the_mean_lacks() -> None:
    first = golden().runs[0]
    joined = merge_seeds([first, replace(first, validation_loss=None)], [0, 1])
    assert joined.validation_loss is None
    assert joined.spread is not None
    assert joined.spread.validation_loss is None


def test_a_comparison_runs_every_seed_and_keeps_what_each_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = CompareConfig(task="ok", lr=0.1, samples=256, runs="sync,async", out=str(out), seed=4, seeds=2)
    with (tmp_path / "terminal").open("w+") as file:
        assert cli.compare_runs(config, Console(file=file, width=120), (sys.executable, synthetic.__file__)) == 0
        file.seek(0)
        terminal = file.read()
    assert "4 runs of ok" in terminal
    assert "sync fp32, seed 5: done" in terminal
    assert "means over 2 seeds" in " ".join(terminal.split())  # a caption is as narrow as its table
    assert " +-0." in terminal
    found = results.read(out / "results.json")
    assert [(run.name, run.seeds) for run in found.runs] == [("sync fp32", [4, 5]), ("async fp32", [4, 5])]
    for of_seeds in found.runs:
        assert [line.partition("--seed=")[2].split()[0] for line in of_seeds.command.splitlines()] == ["4", "5"]
    assert "--seeds=2" in json.loads((out / "results.json").read_text())["settings"]["command"]
    for run in ("sync-fp32", "async-fp32"):
        assert sorted(each.name for each in (out / run).iterdir()) == ["seed-4", "seed-5"]


@pytest.mark.parametrize("seeds", [0, 101])
def test_seeds_out_of_range_are_refused(seeds: int) -> None:
    with pytest.raises(ConfigError, match="seeds must be between 1 and 100"):
        CompareConfig(seeds=seeds)
