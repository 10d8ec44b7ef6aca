"""Tiers of the tests, by what a test module imports.

    quick   starts no process
    check   also forks processes from the server of ``tests.support.processes``, where an import costs nothing
    all     also starts fresh interpreters and other programs

A module is in the lowest tier that its imports allow, directly or through other modules of ``tests``; nobody keeps a
list. ``@pytest.mark.tier("all")`` on a test, or ``pytestmark`` of a module, raises what only takes long.
"""

import ast
import enum
import os
import resource
from functools import cache
from pathlib import Path

from tests.support.processes import children_of

ROOT = Path(__file__).parents[2]
FORKS = ROOT / "tests" / "support" / "processes.py"


class Tier(enum.IntEnum):
    """What a run of the tests includes; a higher tier includes the lower ones."""

    QUICK = 0
    CHECK = 1
    ALL = 2


def tier(name: str) -> Tier:
    """The tier of this name.

    Raises:
        KeyError: there is none.
    """
    return Tier[name.upper()]


@cache
def tier_of(module: Path) -> Tier:
    """The lowest tier that what ``module`` imports allows."""
    seen: set[Path] = set()
    found, left = Tier.QUICK, [module]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        if path == FORKS:
            found = max(found, Tier.CHECK)
            continue
        for name in _imports(path):
            if name.partition(".")[0] in ("subprocess", "multiprocessing"):
                return Tier.ALL
            left += _file(name)
    return found


@cache
def _imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports: ``from a import b`` counts as ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _file(name: str) -> list[Path]:
    """The file of a module of ``tests``."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return [path] if name.startswith("tests.") and path.is_file() else []


def spread(modules: dict[Path, tuple[Tier, int]], num_runners: int) -> list[Path]:
    """An order of modules for runners that begin with equal parts of it: each part starts with what takes longest.

    Args:
        modules: the highest tier of each module's tests, and how many tests it has.
    """
    parts: list[list[Path]] = [[] for _ in range(num_runners)]
    sizes = [0] * num_runners
    for path in sorted(modules, key=lambda path: (-modules[path][0], -modules[path][1], path)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(path)
        sizes[smallest] += modules[path][1]
    return [path for part in parts for path in part]


def processes_so_far() -> tuple[int, int]:
    """A value that changes when this process starts another one: its children, and page faults of those that ended."""
    return len(children_of(os.getpid())), resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
