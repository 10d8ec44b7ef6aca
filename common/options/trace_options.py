"""Options of tracing: which steps, and the file of the trace."""

import re
from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import Check, option

#: Steps that are traced by default: after warm-up, and few enough to look at.
DEFAULT_STEPS = "10:13"
#: Most steps of one trace.
MOST_STEPS = 1000

_STEPS = re.compile(r"([0-9]{1,15}):([0-9]{1,15})", re.ASCII)


def parse_steps(text: str) -> range:
    """Read "FIRST:STOP" as a range; "" is no step.

    Raises:
        ConfigError: the text is not of that form, or has no or too many steps.
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
    """Refuse combinations that would have no effect.

    Raises:
        ConfigError: an option has no effect; says which and why.
    """
    if trace and not trace_steps:
        raise ConfigError(f"trace={trace} needs trace_steps, such as {DEFAULT_STEPS}")
    if not trace and trace_steps not in ("", DEFAULT_STEPS):
        raise ConfigError(f"trace_steps={trace_steps} needs trace, the file to write")
    if trace and standby_of:
        raise ConfigError(f"trace={trace} is for a server that starts the job; standby_of={standby_of} takes one over")
    if trace and shard:
        raise ConfigError(f"trace={trace} is for shard 0, which tells the other shards and writes the trace of all")
