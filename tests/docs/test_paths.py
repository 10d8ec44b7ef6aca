"""Every file of the tree that the documentation names is there."""

import re
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT

_PATH = re.compile(r"`((?:bench|common|compare|deploy|docs|examples|proto|ps|scripts|tests|worker)/[\w./-]+)`")
#: What a run leaves behind.
MADE = {"tests/fuzz/found"}
NAMING = [*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"))]


def absent(text: str) -> list[str]:
    return [path for path in _PATH.findall(text) if path not in MADE and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.stem)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    assert absent(page.read_text(encoding="utf-8")) == []


def test_a_path_that_was_moved_is_found() -> None:
    assert absent("the core (`ps/core/`) and its `ps/core/roster_of_old.py`") == ["ps/core/roster_of_old.py"]
