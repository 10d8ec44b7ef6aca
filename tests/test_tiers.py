"""Tiers of the tests: found from imports, and the tier quick notices every process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import Child
from tests.support.tiers import Tier, processes_so_far, spread, tier_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("source", "tier"),
    [
        ("import torch", Tier.QUICK),
        ("from tests.support import explore", Tier.QUICK),
        ("from torch_ps.worker.commands import processes", Tier.QUICK),  # what it starts, the guard would notice
        ("from tests.support.processes import Child", Tier.CHECK),
        ("from tests.support import jobs", Tier.CHECK),
        ("from tests.support.jobs import job", Tier.CHECK),
        ("def late() -> None:\n    import tests.support.jobs", Tier.CHECK),
        ("import subprocess", Tier.ALL),
        ("import multiprocessing.pool", Tier.ALL),
        ("from subprocess import run", Tier.ALL),
        ("from tests.support import commands", Tier.CHECK),
        ("from tests.support.jobs import job\nfrom tests.deploy.launched import started", Tier.ALL),
    ],
)
def test_tier_of_a_module_follows_from_its_imports(source: str, tier: Tier, tmp_path: Path) -> None:
    module = tmp_path / "test_planted.py"
    module.write_text(source)
    assert tier_of(module) is tier


def test_every_tier_has_modules_of_its_own() -> None:
    assert {tier_of(path) for path in (ROOT / "tests").rglob("test_*.py")} == set(Tier)


def test_each_of_the_runners_begins_with_the_longest_tests() -> None:
    counts = {Tier.ALL: [3, 9, 5], Tier.CHECK: [40, 8, 30, 30], Tier.QUICK: [100, 90, 60, 50, *[5] * 20]}
    modules = {Path(f"{tier}-{i}"): (tier, count) for tier, all_ in counts.items() for i, count in enumerate(all_)}
    order = spread(modules, 3)
    assert sorted(order) == sorted(modules)
    tests = [path for path in order for _ in range(modules[path][1])]
    part = len(tests) // 3
    for runner in range(3):
        begins = [modules[path][0] for path in tests[runner * part :][:12]]
        assert Tier.ALL in begins
        assert Tier.QUICK not in begins[3:]  # at most a few that are left of the part before


def test_process_that_runs_or_has_ended_is_noticed() -> None:
    before = processes_so_far()
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        during = processes_so_far()
        process.communicate("\n")
    assert len({before, during, processes_so_far()}) == 3


def test_run_of_the_tier_quick_fails_where_a_test_starts_a_process(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text("import os\ndef test_one(): os.system('true')\ndef test_two(): pass\n")
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "--tier", "quick", str(planted)]
    settings = ["--rootdir", str(ROOT), "--config-file", str(ROOT / "pyproject.toml")]
    run = Child("pytest:main", ([*settings, *arguments],), tmp_path / "log")
    assert run.wait(60) == 0
    assert "2 passed, 1 error" in run.output
    assert "ERROR at teardown of test_one" in run.output
    assert "started a process, which the tier quick must not" in run.output
