"""Tiers of the tests: found from imports, and the tier quick notices every process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import Child
from tests.support.tiers import Tier, processes_so_far, tier_of

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
