"""``--batch-size auto`` of a comparison: found once, before the first run, and the same for all of them.

Rules of this file
  1. Runs that differ in their batch size cannot be compared. So the workers of the first run say what each of them
     would take, all at the same time and on the devices of the comparison; the smallest is taken, which all can.
  2. How a size is found is the worker's business; here a job is started, listened to and stopped.

    ps-run --batch-size=auto --> start events of all workers --> stop --> the smallest batch size

Source: the start event's settings, ``torch_ps.worker.training.loop``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.compare.events import Start, Tail
from torch_ps.compare.options import CompareConfig
from torch_ps.compare.run_process import PS_RUN, USAGE_ERROR, Child, PlannedRun, arguments, describe_exit, refusal

#: Seconds between two looks at what the workers have written.
LOOK_EVERY = 0.1


@dataclass(frozen=True, slots=True)
class Found:
    """The batch size of all runs; ``reason`` is that of the worker ``name``."""

    size: int
    name: str
    reason: str


def find(plan: PlannedRun, config: CompareConfig, program: Sequence[str] = PS_RUN) -> Found:
    """Start the run of ``plan``, whose folder is for this alone, and stop it when its workers have begun.

    Raises:
        ConfigError: ps-run refused an option.
        RunFailed: it ended before its workers began, or they do not tell their batch size.
    """
    with Child([*program, *arguments(plan, config)], plan) as child:
        tails: dict[str, Tail] = {}
        starts: list[Start] = []
        while len(starts) < config.workers:
            code = child.wait(LOOK_EVERY)
            for path in sorted(plan.events.glob("*.jsonl")):
                tail = tails.setdefault(path.name, Tail(path))
                starts += [event for event in tail.read() if isinstance(event, Start)]
            if code is not None and len(starts) < config.workers:
                if code == USAGE_ERROR and (reason := refusal(plan.log)):
                    raise ConfigError(reason)
                raise child.failure(f"no batch size was found: {describe_exit(code)}")
        sizes = [(start.settings.get("batch_size"), start) for start in starts]
        known = [(size, start) for size, start in sizes if isinstance(size, int) and size > 0]
        if len(known) < config.workers:
            raise child.failure("no batch size was found: the workers do not tell theirs; give batch-size as a number")
    size, start = min(known, key=lambda each: each[0])
    return Found(size, start.name, str(start.settings.get("batch_size_reason", "")))
