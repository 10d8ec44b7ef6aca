"""Progress of training: a bar on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger("torch_ps.worker")

#: Seconds between two log lines.
LOG_EVERY = 5.0


class ProgressDisplay:
    """Shows samples of the job, loss, and rate since the start. A context manager.

    Args:
        total: samples that the job trains on.
        terminal: show a bar; None means if stdout is a terminal.
    """

    def __init__(self, total: int, *, terminal: bool | None = None) -> None:
        self._total = total
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stdout.isatty() if terminal is None else terminal:
            words = TextColumn("{task.completed:.0f} of {task.total:.0f} samples  {task.fields[words]}")
            self._bar = Progress(BarColumn(), words, TimeRemainingColumn(), console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=total, words="")
        self._begin = self._logged = time.monotonic()

    def show(self, step: int, samples: int, loss: float, wait_seconds: float) -> None:
        """Show the state after a step.

        Args:
            step: steps of this worker since the start.
            samples: samples of the whole job.
            loss: loss of this step.
            wait_seconds: seconds this worker has waited for the servers since the start.
        """
        now = time.monotonic()
        spent = max(now - self._begin, 1e-9)
        words = f"loss {loss:.4g}  {samples / spent:.0f} samples/s  waited {wait_seconds / spent:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(samples, self._total), words=words)
        elif now - self._logged >= LOG_EVERY:
            self._logged = now
            log.info("step %d, %d of %d samples of the job: %s", step, samples, self._total, words.replace("  ", ", "))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
