"""The registry of modes has the names that options know, and refuses values that mean nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.mode_choices import COMPENSATION_STRENGTHS, DELAY_COMPENSATION, MODES
from torch_ps.common.options.parsers import parse_compensation
from torch_ps.ps.core.modes import POLICIES, Mode


def test_every_name_has_a_policy_and_no_other_has() -> None:
    assert tuple(POLICIES) == MODES


@pytest.mark.parametrize("form", DELAY_COMPENSATION)
def test_every_form_of_compensation_that_can_be_written_makes_a_mode(form: str) -> None:
    name, strength = parse_compensation(form)
    mode = Mode(name="async", delay_compensation=name, compensation_strength=strength or 1.0)
    assert mode.compensates == (form in COMPENSATION_STRENGTHS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "bsp"}, "mode must be one of sync, async, ssp; got 'bsp'"),
        ({"staleness_lr": "square"}, "staleness_lr must be one of constant, inverse; got 'square'"),
        ({"delay_compensation": "on"}, "delay_compensation must be one of off, constant, adaptive; got 'on'"),
        ({"compensation_strength": 0}, "compensation_strength must be > 0; got 0"),
        ({"slack": -1}, "slack must be >= 0; got -1"),
    ],
)
def test_mode_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Mode(**settings)
