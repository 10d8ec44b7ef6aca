"""Workers that are slowed down on purpose: "w1:3x", worker 1 takes three times as long for each step.

Rules of this file
  1. ps-run and ps-compare both parse the option here, so they accept the same texts.
"""

import re
from collections.abc import Iterable

from torch_ps.common.errors import ConfigError

_SLOW = re.compile(r"w(?P<rank>[0-9]{1,4}):(?P<factor>[0-9]+(?:\.[0-9]+)?)x?", re.ASCII)


def parse_slow(texts: Iterable[str]) -> dict[int, float]:
    """Read ("w1:3x", "w2:2x") or ("w1:3x,w2:2x",) as {1: 3.0, 2: 2.0}.

    Raises:
        ConfigError: a text is not of that form, a factor is below 1, or a worker is named twice.
    """
    found: dict[int, float] = {}
    for text in (part.strip() for each in texts for part in each.split(",") if part.strip()):
        match = _SLOW.fullmatch(text)
        if match is None or float(match["factor"]) < 1:
            raise ConfigError(f"slow must be WORKER:FACTOR with a factor of at least 1, such as w1:3x; got {text!r}")
        if (rank := int(match["rank"])) in found:
            raise ConfigError(f"slow names w{rank} twice")
        found[rank] = float(match["factor"])
    return found


def slow_of(texts: Iterable[str], workers: int) -> dict[int, float]:
    """Read the texts as ``parse_slow`` does, for a job of ``workers`` workers.

    Raises:
        ConfigError: ``parse_slow`` refuses a text, or it names a worker that the job does not have.
    """
    found = parse_slow(texts)
    for rank in found:
        if rank >= workers:
            last = f"w0 to w{workers - 1}" if workers > 1 else "w0"
            raise ConfigError(f"slow names w{rank}; the workers of this job are {last}")
    return found
