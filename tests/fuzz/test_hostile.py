"""Hostile members find nothing in a few sequences, and planted bugs in two minutes; ``make hostile`` goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.hostile import search
from tests.fuzz.mutants import MUTANTS


def test_hostile_members_end_nothing() -> None:
    assert search(0.0, 1, sequences=4) == 4


@pytest.mark.tier("all")
@pytest.mark.parametrize("name", MUTANTS)
def test_hostile_members_find(name: str) -> None:
    """In a process of its own, where the random sequences do not depend on what other tests have left behind."""
    command = [sys.executable, "-m", "tests.fuzz.mutants", name, "100"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("found: ")
