"""Executes the planned runs one after another and collects their journals.

Rules of this file
  1. A failed run is recorded with its reason and the next one starts. If an option of the first run is refused, no
     other is tried, as it would be refused too.
  2. Ctrl-C ends the current run and skips the rest; finished runs are kept.

    PlannedRun --Child--> events --Tail--> Reporter
                           --read_journals--> Finished | Failure
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare.events import End, Evaluation, Event, Journal, Start, Step, Tail, read_journals
from torch_ps.compare.results import Failure
from torch_ps.compare.run_process import (
    PS_RUN,
    USAGE_ERROR,
    Child,
    PlannedRun,
    RunRefused,
    arguments,
    command_line,
    describe_exit,
    refusal,
)
from torch_ps.compare.run_progress import Reporter, RunState

#: Seconds between two reads of a run's events.
LOOK_EVERY = 0.25


@dataclass(slots=True)
class Executed:
    """Result of executing the planned runs.

    Attributes:
        finished: runs that finished, each with the journals of its workers.
        failures: runs that did not finish.
        interrupted: whether Ctrl-C ended the comparison before all runs had finished.
    """

    finished: list[tuple[PlannedRun, list[Journal]]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False


def execute(
    plans: Sequence[PlannedRun], config: CompareConfig, reporter: Reporter, program: Sequence[str] = PS_RUN
) -> Executed:
    """Execute every planned run.

    Args:
        plans: runs in their order.
        config: options that all runs share.
        reporter: display of the progress.
        program: command that takes the options of ps-run.

    Raises:
        ConfigError: an option of the first run was refused; its folder has been removed.
    """
    result = Executed()
    with reporter:
        for plan in plans:
            monitor = RunMonitor(plan, config.workers)
            try:
                journals = _run(plan, config, reporter, program, monitor)
                result.finished.append((plan, journals))
            except KeyboardInterrupt:
                result.failures.append(_failure(plan, config, "stopped by Ctrl-C"))
                reporter.done(plan.name, monitor.state("stopped"), failed=True)
                result.interrupted = True
                break
            except RunRefused as error:
                if plan is plans[0]:
                    reporter.done(plan.name, monitor.state("refused"), failed=True)
                    leave_nothing(plan.folder)
                    raise ConfigError(str(error)) from None
                result.failures.append(_failure(plan, config, str(error)))
                reporter.done(plan.name, monitor.state("refused"), failed=True)
            except PsError as error:
                result.failures.append(_failure(plan, config, str(error)))
                reporter.done(plan.name, monitor.state("failed"), failed=True)
    return result


class RunMonitor:
    """Progress of a run, from the events that its workers have written so far."""

    def __init__(self, plan: PlannedRun, workers: int) -> None:
        self._plan = plan
        self._workers = workers
        self._tails: dict[str, Tail] = {}
        self._started = math.inf
        self._now = -math.inf
        self._samples = 0
        self._ended = 0
        self._losses: list[float] = []

    def look(self) -> RunState:
        for path in sorted(self._plan.events.glob("*.jsonl")):
            tail = self._tails.setdefault(path.name, Tail(path))
            self._see(tail.read())
        return self.state()

    def state(self, phase: str = "") -> RunState:
        recent = self._losses[-2 * self._workers :]
        return RunState(
            phase=phase or self._phase(),
            samples=self._samples,
            seconds=max(0.0, self._now - self._started) if math.isfinite(self._started) else 0.0,
            loss=sum(recent) / len(recent) if recent else math.nan,
        )

    def _see(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Start):
                self._started = min(self._started, event.time)
            elif isinstance(event, Step):
                self._samples = max(self._samples, event.job_samples)
                self._now = max(self._now, event.time)
                self._losses.append(event.loss)
            elif isinstance(event, End):
                self._ended += 1
                self._now = max(self._now, event.time)
            elif isinstance(event, Evaluation):
                self._samples = max(self._samples, event.job_samples)
        del self._losses[: -2 * self._workers]

    def _phase(self) -> str:
        if self._ended >= self._workers:
            return "evaluating"
        return "training" if self._losses else "starting"


def _run(
    plan: PlannedRun, config: CompareConfig, reporter: Reporter, program: Sequence[str], monitor: RunMonitor
) -> list[Journal]:
    name = plan.name
    reporter.show(name, monitor.state())
    with Child([*program, *arguments(plan, config)], plan) as child:
        while (code := child.wait(LOOK_EVERY)) is None:
            reporter.show(name, monitor.look())
        monitor.look()
        if code == USAGE_ERROR and (reason := refusal(plan.log)):
            raise RunRefused(reason)
        if code != 0:
            raise child.failure(describe_exit(code))
        journals = read_journals(plan.events)
        _check(journals, config, child)
    reporter.done(name, monitor.state("done"))
    return journals


def _check(journals: Sequence[Journal], config: CompareConfig, child: Child) -> None:
    """Refuse a run of which a worker did not train to the end."""
    ended = [journal for journal in journals if journal.end and journal.end.status == "ok" and journal.steps]
    if len(ended) < config.workers:
        raise child.failure(
            f"ps-run succeeded, but only {len(ended)} of {config.workers} workers wrote their last event"
        )


def leave_nothing(folder: Path) -> None:
    """Remove the folder of a run that never began, so that a corrected command can use it."""
    shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.rmdir()


def _failure(plan: PlannedRun, config: CompareConfig, reason: str) -> Failure:
    return Failure(name=plan.name, reason=reason, log=str(plan.log), command=command_line(plan, config))
