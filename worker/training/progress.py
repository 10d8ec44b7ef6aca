"""Where training stands: one bar on a terminal, else a log line every few seconds."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger("torch_ps.worker")

#: Seconds between two log lines.
EVERY = 5.0


class Display:
    """Shows the samples of the job, the loss, and the rate since the start. A context manager.

    Args:
        total: samples of the job.
        terminal: show a bar; None asks whether stdout is a terminal.
    """

    def __init__(self, total: int, *, terminal: bool | None = None) -> None:
        self._total = total
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stdout.isatty() if terminal is None else terminal:
            words = TextColumn("{task.completed:.0f} of {task.total:.0f} samples  {task.fields[words]}")
            self._bar = Progress(BarColumn(), words, TimeRemainingColumn(), console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=total, words="")
        self._begin = self._said = time.monotonic()

    def show(self, step: int, samples: int, loss: float, wait_seconds: float) -> None:
        """Called after every step, with what is true since the start."""
        now = time.monotonic()
        spent = max(now - self._begin, 1e-9)
        words = f"loss {loss:.4g}  {samples / spent:.0f} samples/s  waited {wait_seconds / spent:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(samples, self._total), words=words)
        elif now - self._said >= EVERY:
            self._said = now
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
