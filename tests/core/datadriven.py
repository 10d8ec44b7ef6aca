"""Data-driven cases: a text file of calls and what each returns, which people read and a runner replays.

    # A comment: what the file shows.
    push a step=0
    ----
    Wait a step 0 for b: step 0 waits for b

A case is one line of a call, a line of four dashes, and the expected output; an empty line ends it. A call is a
command, its plain words, and its NAME=VALUE settings. A command that returns nothing prints "ok".

    python -m tests.core.test_testdata --rewrite [FILE...]    # write what the core says now; read the diff

Source: cockroachdb/datadriven, as etcd-io/raft uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DASHES = "----"


@dataclass(frozen=True, slots=True)
class Call:
    """One call: ``push a step=0`` has the command push, the words ("a",) and the settings {"step": "0"}."""

    command: str
    words: tuple[str, ...]
    settings: dict[str, str]

    def number(self, name: str, default: int = 0) -> int:
        return int(self.settings.get(name, default))


@dataclass(frozen=True, slots=True)
class Case:
    """A call as it is written, with the line number of the file and the output that is expected."""

    line: int
    text: str
    expected: str


#: Runs one call and returns its output, without a newline at the end.
Run = Callable[[Call], str]


def parse_call(text: str) -> Call:
    command, *rest = text.split()
    settings = dict(each.split("=", 1) for each in rest if "=" in each)
    return Call(command, tuple(each for each in rest if "=" not in each), settings)


def read(text: str) -> list[Case]:
    """The cases of a file.

    Raises:
        ValueError: a call is not followed by a line of dashes.
    """
    lines, cases, i = text.splitlines(), list[Case](), 0
    while i < len(lines):
        if not lines[i].strip() or lines[i].startswith("#"):
            i += 1
            continue
        if i + 1 == len(lines) or lines[i + 1] != DASHES:
            raise ValueError(f"line {i + 1}: {lines[i]!r} is not followed by a line of {DASHES}")
        stop = i + 2
        while stop < len(lines) and lines[stop]:
            stop += 1
        cases.append(Case(i + 1, lines[i], "\n".join(lines[i + 2 : stop])))
        i = stop
    return cases


def rewritten(text: str, run: Run) -> str:
    """The same file with the output that ``run`` gives."""
    lines, out, after = text.splitlines(), list[str](), 0
    for case in read(text):
        out += lines[after : case.line]
        out += [DASHES, run(parse_call(case.text))]
        after = case.line + 1 + (case.expected.count("\n") + 1 if case.expected else 0)
    return "\n".join([*out, *lines[after:]]).rstrip("\n") + "\n"


def differences(text: str, run: Run) -> list[str]:
    """One text for each case whose output is not the expected one."""
    found = []
    for case in read(text):
        said = run(parse_call(case.text))
        if said != case.expected:
            found.append(f"line {case.line}: {case.text}\nexpected:\n{case.expected}\nsaid:\n{said}")
    return found


def rewrite(path: Path, run: Run) -> None:
    path.write_text(rewritten(path.read_text(encoding="utf-8"), run), encoding="utf-8")
