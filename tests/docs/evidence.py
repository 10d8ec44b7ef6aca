"""Whether a test runs a command that the documentation shows, by what is written in it.

    quoted    the words of the test name a page that shows this very command, and its beginning: it takes the line from
              the page
    alike     its program and each of its long options are in the test, in what its module shares (helpers, fixtures,
              constants), or in a file that is named beside it

An option counts as ``--lease``, ``lease=`` or ``"lease"``, for it is declared once, under one name. Values may be
others: a free port, fewer samples. That the page spells the options as the program wants them is another test's claim.
"""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

from tests.docs.commands import PAGES, ROOT, blocks, commands_of

#: What is found in a test that starts a program without its name.
ALSO = {
    "ps-serve": ("torch_ps.ps.server.cli", "ServerConfig"),
    "ps-worker": ("torch_ps.worker.commands.worker",),
    "ps-run": ("torch_ps.worker.commands.run",),
    "ps-status": ("torch_ps.worker.commands.status",),
    "ps-compare": ("torch_ps.compare.cli", "CompareConfig"),
    "curl": ("urllib.request",),
}


def lacking(where: str, command: list[str]) -> list[str]:
    """Words of the command for which the test, named with files beside it, has no evidence.

    Raises:
        LookupError: there is no such test, or several.
    """
    name, *beside = where.split()
    test, shared = _found(name)
    if _quotes(test, command):
        return []
    if command[0] == "make":
        command = _recipe(command[1])
    text = "\n".join([ast.unparse(test), shared, *((ROOT / each).read_text(encoding="utf-8") for each in beside)])
    options = [word for word in dict.fromkeys(_own(command)) if re.match("--[a-z]", word)]
    return [*_program(command, text), *(option for option in options if not _told(option, text))]


@cache
def _found(name: str) -> tuple[ast.FunctionDef, str]:
    """The test, and the source of its module without the tests."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    own = [text for text in texts if f"\ndef {name}(" in text]
    if len(own) != 1:
        raise LookupError(f"{len(own)} tests are called {name!r}")
    body = ast.parse(own[0]).body
    tests = [each for each in body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")]
    shared = "\n".join(ast.unparse(each) for each in body if each not in tests)
    return next(each for each in tests if each.name == name), shared


def _quotes(test: ast.FunctionDef, command: list[str]) -> bool:
    words = {each.value for each in ast.walk(test) if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    quotes = [word for word in words if " " in word]
    shown = [block for page in PAGES if str(page.relative_to(ROOT)) in words for block in blocks(page)]
    there = [block for block in shown if command in commands_of(block)]
    if "blocks(" in ast.unparse(test) and any(word in block for word in quotes for block in there):
        return True  # the whole block is run
    return bool(there) and any(" ".join(command).startswith(word) for word in quotes)


def _program(command: list[str], text: str) -> list[str]:
    name = Path(command[1]).name if command[0] == "python" else command[0]
    return [] if any(each in text for each in (name, *ALSO.get(name, ()))) else [name]


def _own(command: list[str]) -> list[str]:
    """Without what a script behind the options is given, and what the program is that starts one."""
    words = command[2:] if command[0] == "python" else command[1:]
    scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
    return words[: scripts[0]] if scripts else words


def _told(option: str, text: str) -> bool:
    field = option[2:].replace("-", "_")
    return re.search(rf"{option}\b|\b{field}=|['\"]{field}['\"]", text) is not None


def _recipe(target: str) -> list[str]:
    """The program that make runs for it, in the end."""
    done = subprocess.run(
        ["make", "--dry-run", "--quiet", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()[-1].replace("-m tests.", "tests.").split()[:2]
