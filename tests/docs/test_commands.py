"""Every command that the documentation shows is one that exists, with options that it has."""

import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from tests.docs.commands import PAGES, ROOT, commands
from tests.docs.evidence import lacking
from tests.docs.run_by import RUN_BY

#: Programs that this project does not bring; what they are given is tested in tests/deploy and tests/server.
OTHERS = {
    *(
        ".",
        "curl",
        "docker",
        "echo",
        "kubectl",
        "openssl",
        "pip",
        "printf",
        "ray",
        "sbatch",
        "tensorboard",
        "torchrun",
        "umask",
    ),
}
SHOWN = [(page, words) for page in PAGES for words in commands(page)]
OURS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def named(shown: tuple[Path, list[str]]) -> str:
    return f"{shown[0].stem}: {' '.join(shown[1])}"[:90]


def of(*programs: str) -> list[tuple[Path, list[str]]]:
    found = [(page, words) for page, words in SHOWN if words[0] in programs]
    assert found
    return found


def test_every_program_in_the_documentation_is_known() -> None:
    known = {*OURS, *OTHERS, "make", "python"}
    assert {words[0] for _, words in SHOWN} <= known


@pytest.mark.parametrize("shown", of(*OURS), ids=named)
def test_our_commands_have_the_options_that_are_shown(shown: tuple[Path, list[str]]) -> None:
    _, (name, *arguments) = shown
    module, function = OURS[name].split(":")
    command: click.Command = getattr(importlib.import_module(module), function)
    arguments = [word for word in arguments if word != "..."]
    command.make_context(name, arguments).close()


@pytest.mark.parametrize("shown", of("make"), ids=named)
def test_targets_of_make_exist(shown: tuple[Path, list[str]]) -> None:
    _, (_, target, *_) = shown
    done = subprocess.run(
        ["make", "--dry-run", "--quiet", target],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shown", of("python"), ids=named)
def test_scripts_exist_and_know_the_options_that_are_shown(shown: tuple[Path, list[str]]) -> None:
    _, (_, script, *arguments) = shown
    text = (ROOT / script).read_text(encoding="utf-8")
    shared = (ROOT / "bench" / "pushpull.py").read_text(encoding="utf-8")  # its options() are those of many
    for option in [word for word in arguments if word.startswith("--")]:
        assert re.search(rf'add_argument\("{option}"', text + shared), option


def test_every_command_is_run_by_a_test_or_its_page_says_what_was_lacking() -> None:
    used = set()
    for page, words in SHOWN:
        name = str(page.relative_to(ROOT / "docs").with_suffix("")) if page.parent != ROOT else page.stem
        found = max((each for each in RUN_BY if _fits(each, name, " ".join(words))), key=_rank, default=None)
        assert found is not None, f"{name}: who runs {' '.join(words)}?"
        used.add(found)
        kind, _, reason = RUN_BY[found].partition(": ")
        if kind == "page says":
            assert reason in " ".join(page.read_text(encoding="utf-8").split()), (found, reason)
        elif kind != "by hand":
            assert lacking(RUN_BY[found], words) == [], (found, " ".join(words))
    assert set(RUN_BY) == used


@pytest.mark.parametrize(
    ("where", "command", "lacks"),
    [
        ("test_the_example_trains_as_a_script", "ps-run -n 2 --mode async x.py", ["--mode"]),
        ("test_the_example_trains_as_a_script", "ps-export DIR FILE", ["ps-export"]),
        ("test_training_learns_the_text", "ps-run -n 2 --task gpt", ["ps-run", "--task"]),
    ],
)
def test_a_test_that_does_not_run_a_command_is_not_taken_for_one(where: str, command: str, lacks: list[str]) -> None:
    assert lacking(where, command.split()) == lacks


def _fits(beginning: str, name: str, command: str) -> bool:
    page, _, start = beginning.partition(": ")
    return page in ("", name) and command.startswith(start)


def _rank(beginning: str) -> tuple[bool, int]:
    """Those of the page come first, of these the longest."""
    page, _, start = beginning.partition(": ")
    return bool(page), len(start)
