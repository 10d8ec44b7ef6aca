"""The commands that the documentation shows, as a shell would take them apart."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
_PROMPT = re.compile(r"^(?:\w+)?\$ ")
_SETS = re.compile(r"^\w+=\S*$")


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """Every simple command of the shell blocks of a page, as words; "..." stands for arguments of your own."""
    found = []
    for block in blocks(page):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(_PROMPT.sub("", line.strip()).strip("()"), comments=True)
            for part in _parts(words):
                while part and (_SETS.match(part[0]) or part[0] == "sudo"):
                    part = part[1:]
                if part:
                    found.append(part)
    return found


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
