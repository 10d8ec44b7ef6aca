"""The commands that the documentation shows, as a shell would take them apart."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
_PROMPT = re.compile(r"^(?:\w+)?\$ ")
_VARIABLES = re.compile(r"^(?:\w+=\S* )*")
_SETS = re.compile(r"^\w+=\S*$")


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """Every simple command of the shell blocks of a page, as words; "..." stands for arguments of your own."""
    return [command for block in blocks(page) for command in commands_of(block)]


def commands_of(block: str) -> list[list[str]]:
    """Those of one block."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = shlex.split(_PROMPT.sub("", line.strip()).strip("()"), comments=True)
        for part in _parts(words):
            while part and (_SETS.match(part[0]) or part[0] == "sudo"):
                part = part[1:]
            if part:
                found.append(part)
    return found


def shown(page: str, *starts: str) -> list[str]:
    r"""For each beginning the first line of a page's shell blocks with such a command, without its prompt.

    Lines that a \ continues are one.
    """
    text = "".join(blocks(ROOT / page)).replace("\\\n", "")
    lines = [" ".join(_PROMPT.sub("", line.strip()).split()) for line in text.splitlines()]
    return [next(line for line in lines if _VARIABLES.sub("", line).startswith(start)) for start in starts]


def _parts(words: list[str]) -> list[list[str]]:
    """Cut where the shell would start another command."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", "|", ";"):
            parts.append([])
        elif word.endswith(";"):
            parts[-1].append(word[:-1])
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
