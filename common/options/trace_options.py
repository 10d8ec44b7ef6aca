"""The options that say which steps are traced, and where the trace goes."""

import re
from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import Check, option

#: Steps that are traced where nothing is said: warm, and few enough to look at.
DEFAULT_STEPS = "10:13"
#: Most steps of one trace.
MOST_STEPS = 1000

_STEPS = re.compile(r"([0-9]{1,15}):([0-9]{1,15})", re.ASCII)


def parse_steps(text: str) -> range:
    """Read "FIRST:STOP"; "" is no step.

    Raises:
        ConfigError: not of that form, or too many.
    """
    if not text:
        return range(0)
    match = _STEPS.fullmatch(text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not 1 <= len(steps) <= MOST_STEPS:
        raise ConfigError(
            f"steps to trace must be FIRST:STOP, STOP not included, such as {DEFAULT_STEPS} for three, "
            f"{MOST_STEPS} at most; got {text!r}"
        )
    return steps


def trace() -> Any:
    return option(
        "",
        "write a timeline of some steps, over all processes, for ui.perfetto.dev (.json, or .json.gz)",
        metavar="FILE",
    )


def trace_steps(default: str = DEFAULT_STEPS, help: str = "steps of that timeline, STOP not included") -> Any:
    check = Check("", lambda text: text == "" or bool(parse_steps(text)))
    return option(default, help, metavar="FIRST:STOP", check=check)


def check(trace: str, trace_steps: str, *, shard: int, standby_of: str) -> None:
    """Refuse what would have no effect.

    Raises:
        ConfigError: says what.
    """
    if trace and not trace_steps:
        raise ConfigError(f"trace={trace} needs trace_steps, such as {DEFAULT_STEPS}")
    if not trace and trace_steps not in ("", DEFAULT_STEPS):
        raise ConfigError(f"trace_steps={trace_steps} needs trace, the file to write")
    if trace and standby_of:
        raise ConfigError(f"trace={trace} is for a server that begins the job; standby_of={standby_of} takes it over")
    if trace and shard:
        raise ConfigError(f"trace={trace} is for shard 0, which tells the others and writes what all have done")
