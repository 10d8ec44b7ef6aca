"""The glossary names what the code has: each word once, and the effects, modes and codecs that exist."""

import re
from typing import get_args

from tests.docs.commands import ROOT
from torch_ps.common.codecs import registry
from torch_ps.common.options.mode_choices import MODES
from torch_ps.ps.core.effects import Effect

ROWS = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.M))


def test_no_word_has_two_rows() -> None:
    words = re.findall(r"^\| ([^|`]+) \|", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.M)
    words = [word for word in words if word not in ("word", "---")]
    assert len(words) > 50
    assert sorted(words) == sorted(set(words))


def test_effects_modes_and_codecs_are_those_of_the_code() -> None:
    assert re.findall("`(.+?)`", ROWS["effect"]) == [effect.__name__ for effect in get_args(Effect)]
    assert re.findall("`(.+?)`", ROWS["mode"]) == list(MODES)
    assert sorted(re.findall("`(.+?)`", ROWS["codec"])) == sorted(registry._BUILT_IN)
