"""Progress display of the runs: one bar per run on a terminal, plain lines elsewhere.

Rules of this file
  1. The caller passes the state of a run; nothing is read here, and only a rate is computed.
  2. All drawing is on the caller's thread: no other thread may exist when a child process is started.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

#: Seconds between two plain lines of a run.
LINE_EVERY = 10.0


@dataclass(frozen=True, slots=True)
class RunState:
    """Progress of a run.

    Attributes:
        phase: waiting, starting, training, evaluating, done, failed, refused or stopped.
        samples: samples that the job has trained on.
        seconds: seconds since the first worker started training.
        loss: mean training loss of the last steps; NaN before the first.
    """

    phase: str
    samples: int = 0
    seconds: float = 0.0
    loss: float = math.nan

    @property
    def rate(self) -> float:
        return self.samples / self.seconds if self.seconds > 0 else 0.0


class Reporter(Protocol):
    """A display of progress."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, name: str, state: RunState) -> None:
        """Show the state of a run; called a few times per second."""

    def done(self, name: str, state: RunState, *, failed: bool = False) -> None:
        """Show the final state of a run."""


def reporter(console: Console, names: Sequence[str], samples: int) -> Reporter:
    """Choose the display: bars on a terminal, plain lines in a pipe or a log."""
    if console.is_terminal and not console.is_dumb_terminal:
        return Bars(console, names, samples)
    return Lines(console, samples)


class Bars:
    """One rich bar per run, all on screen from the start."""

    def __init__(self, console: Console, names: Sequence[str], samples: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=max(8, min(40, console.width - 68))),
            _Figures(),
            console=console,
            auto_refresh=False,
        )
        self._tasks: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=samples, state=RunState("waiting")) for name in names
        }

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, name: str, state: RunState) -> None:
        self._progress.update(self._tasks[name], completed=state.samples, state=state)
        self._progress.refresh()

    def done(self, name: str, state: RunState, *, failed: bool = False) -> None:
        if failed:
            self._progress.update(self._tasks[name], description=f"[red]{name}")
        self.show(name, state)


class _Figures(ProgressColumn):
    """The figures right of the bar."""

    max_refresh = None

    def render(self, task: Task) -> RenderableType:
        state: RunState = task.fields["state"]
        total = int(task.total or 0)
        words = [state.phase.ljust(8)]
        if state.samples:
            words += [f"{state.samples:>{len(str(total))}}/{total}", f"{state.rate:6.1f}/s"]
        if math.isfinite(state.loss):
            words.append(f"loss {state.loss:.3f}")
        if state.samples and state.phase == "training":
            words.append(f"{_clock((total - state.samples) / state.rate) if state.rate else '--:--'} left")
        elif state.seconds:
            words.append(f"{state.seconds:.1f} s")
        return Text("  ".join(words), no_wrap=True)


class Lines:
    """One line at each change of phase, and one every ``LINE_EVERY`` seconds of training."""

    def __init__(self, console: Console, samples: int) -> None:
        self._console = console
        self._samples = samples
        self._last: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, name: str, state: RunState) -> None:
        phase, shown = self._last.get(name, ("", -math.inf))
        now = time.monotonic()
        if state.phase != phase or (phase == "training" and now - shown >= LINE_EVERY):
            self._last[name] = (state.phase, now)
            self._print(name, state)

    def done(self, name: str, state: RunState, *, failed: bool = False) -> None:
        self._print(name, state)

    def _print(self, name: str, state: RunState) -> None:
        words = [f"{name}: {state.phase}"]
        if state.samples:
            words.append(f"{state.samples}/{self._samples} samples, {state.rate:.1f}/s, {state.seconds:.1f} s")
        if math.isfinite(state.loss):
            words.append(f"loss {state.loss:.3f}")
        self._console.print(", ".join(words), markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
