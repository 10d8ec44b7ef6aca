"""Commands whose output nobody reads, or that have none: they end as other Unix tools do, without a traceback."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from torch_ps.common.options.command_line import Command

ROOT = Path(__file__).parents[2]
#: A command as ours are made, in a fresh interpreter.
PROGRAM = """
import sys
import click
from torch_ps.common.options.command_line import Command

@click.command(cls=Command, name="ps-any")
@click.argument("lines", type=int)
def main(lines):
    for line in range(lines):
        click.echo("line %d" % line)
    sys.stdout.write("end")
    sys.exit(3)

main()
"""


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run ``line``, in which $ANY is the command; its exit code is that of the command's pipeline."""
    script = f'set -o pipefail; any() {{ {sys.executable} -c "$PROGRAM" "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={"PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_all_commands_are_made_the_same_way() -> None:
    ours = [each for each in entry_points(group="console_scripts") if each.value.startswith("torch_ps.")]
    assert len(ours) == 6
    assert [each.name for each in ours if not isinstance(each.load(), Command)] == []


@pytest.mark.parametrize(
    ("line", "code", "out"),
    [
        ("any 99999 | head -n 1", 141, "line 0\n"),
        ("any 99999 2>&1 | head -n 1", 141, "line 0\n"),
        ("any 1 | true", 141, ""),
        ("any --help | true", 1, ""),
        ("any 1 >&-", 3, ""),
        ("any 1 <&- >&- 2>&-", 3, ""),
        ("any 1", 3, "line 0\nend"),
    ],
)
def test_output_that_nobody_reads_is_no_bug(line: str, code: int, out: str) -> None:
    done = shell(line)
    # Whether a command is done before its reader has gone is a race that it may win.
    assert (done.returncode, done.stdout) in {(code, out), *({(3, out), (0, out)} if "true" in line else ())}
    assert done.stderr == ""


def test_full_disk_under_the_output_is_one_line() -> None:
    done = shell("any 1 > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "Error: No space left on device; make room there\n"
