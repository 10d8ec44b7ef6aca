"""``--batch-size auto`` of a comparison: one batch size for all runs, found before the first.

Rules of this file
  1. Runs with different batch sizes cannot be compared. So the workers of the first run find their batch sizes, all at
     the same time and on the devices of the comparison, and every run uses the smallest.
  2. The workers find the size; here a job is started, its events are read, and it is stopped.

    ps-run --batch-size=auto --> start events of all workers --> stop --> the smallest batch size

Source: ``torch_ps.worker.training.loop`` writes the settings into the start event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare.events import Start, Tail
from torch_ps.compare.run_process import PS_RUN, USAGE_ERROR, Child, PlannedRun, arguments, describe_exit, refusal

#: Seconds between two reads of the workers' events.
LOOK_EVERY = 0.1


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The batch size of all runs, and the reason that the worker ``name`` gave for it."""

    size: int
    name: str
    reason: str


def find(plan: PlannedRun, config: CompareConfig, program: Sequence[str] = PS_RUN) -> BatchSize:
    """Start a run, and stop it when its workers have found their batch sizes.

    Args:
        plan: run to start, with a folder of its own.
        config: options that all runs share.
        program: command that takes the options of ps-run.

    Raises:
        ConfigError: ps-run refused an option.
        RunFailed: ps-run ended before its workers began, or they did not report their batch sizes.
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
            raise child.failure(
                "no batch size was found: the workers did not report theirs; give batch-size as a number"
            )
    size, start = min(known, key=lambda each: each[0])
    return BatchSize(size, start.name, str(start.settings.get("batch_size_reason", "")))
