"""The cases of testdata/*.txt: what the core says to each call is what the file says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.core.datadriven import Run, differences, parse_call, read, rewrite, rewritten
from tests.core.job_script import JobScript
from tests.core.seat_script import SeatScript

FOLDER = Path(__file__).parent / "testdata"
FILES = sorted(FOLDER.glob("*.txt"))


def script_of(path: Path) -> Run:
    """A fresh script; files about seats begin with seat_."""
    return SeatScript() if path.name.startswith("seat_") else JobScript()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_core_says_what_the_file_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(read(text)) > 3
    assert "\n".join(differences(text, script_of(path))) == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_of_expected_output_is_compared(path: Path) -> None:
    """With any one expected output made wrong, that case fails and no other does."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for case in read(text):
        wrong = [*lines[: case.line + 1], "wrong", *lines[case.line + 1 :]]
        (found,) = differences("\n".join(wrong), script_of(path))
        assert found.startswith(f"line {case.line}: {case.text}\nexpected:\nwrong\n")


def test_wrong_expectation_is_shown() -> None:
    text = "job mode=sync workers=1\n----\nasync\n"
    assert differences(text, JobScript()) == ["line 1: job mode=sync workers=1\nexpected:\nasync\nsaid:\nsync"]


def test_rewriting_writes_what_the_core_says_and_keeps_the_rest() -> None:
    text = "# A comment.\n\nnow 1\n----\nwrong\n\n# Another.\npush a\n----\n"
    unknown = "UnknownWorker: session 0 of worker 'a' is not in roster epoch 0; join again"
    assert rewritten(text, JobScript()) == f"# A comment.\n\nnow 1\n----\nok\n\n# Another.\npush a\n----\n{unknown}\n"


def test_call_without_dashes_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2: 'push a' is not followed by a line of ----"):
        read("# A comment.\npush a\n")


def test_unknown_command_fails() -> None:
    with pytest.raises(AttributeError, match="do_pusch"):
        JobScript()(parse_call("pusch a"))


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--rewrite"], "usage: python -m tests.core.test_testdata --rewrite [FILE...]"
    for each in map(Path, sys.argv[2:] or map(str, FILES)):
        rewrite(each, script_of(each))
