"""What is shown while runs train: one bar per run on a terminal, plain lines elsewhere.

Rules of this file
  1. Reads nothing and computes nothing but a rate; it is told where a run stands.
  2. Draws in the caller's thread only: no thread of ours is alive when a child is started.
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
class Live:
    """Where a run stands. ``loss`` is the newest training loss; ``seconds`` since its first worker started training."""

    phase: str
    samples: int = 0
    seconds: float = 0.0
    loss: float = math.nan

    @property
    def rate(self) -> float:
        return self.samples / self.seconds if self.seconds > 0 else 0.0


class Reporter(Protocol):
    """Both ways to show progress."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, name: str, live: Live) -> None:
        """Show where a run stands; called a few times a second."""

    def done(self, name: str, live: Live, *, failed: bool = False) -> None:
        """The last word on a run."""


def reporter(console: Console, names: Sequence[str], samples: int) -> Reporter:
    """Bars on a terminal, plain lines in a pipe or a log."""
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
            name: self._progress.add_task(name, total=samples, live=Live("waiting")) for name in names
        }

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, name: str, live: Live) -> None:
        self._progress.update(self._tasks[name], completed=live.samples, live=live)
        self._progress.refresh()

    def done(self, name: str, live: Live, *, failed: bool = False) -> None:
        if failed:
            self._progress.update(self._tasks[name], description=f"[red]{name}")
        self.show(name, live)


class _Figures(ProgressColumn):
    """The text right of the bar."""

    max_refresh = None

    def render(self, task: Task) -> RenderableType:
        live: Live = task.fields["live"]
        total = int(task.total or 0)
        words = [live.phase.ljust(8)]
        if live.samples:
            words += [f"{live.samples:>{len(str(total))}}/{total}", f"{live.rate:6.1f}/s"]
        if math.isfinite(live.loss):
            words.append(f"loss {live.loss:.3f}")
        if live.samples and live.phase == "training":
            words.append(f"{_clock((total - live.samples) / live.rate) if live.rate else '--:--'} left")
        elif live.seconds:
            words.append(f"{live.seconds:.1f} s")
        return Text("  ".join(words), no_wrap=True)


class Lines:
    """A line when something begins or ends, and one every ``LINE_EVERY`` seconds in between."""

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

    def show(self, name: str, live: Live) -> None:
        phase, shown = self._last.get(name, ("", -math.inf))
        now = time.monotonic()
        if live.phase != phase or (phase == "training" and now - shown >= LINE_EVERY):
            self._last[name] = (live.phase, now)
            self._print(name, live)

    def done(self, name: str, live: Live, *, failed: bool = False) -> None:
        self._print(name, live)

    def _print(self, name: str, live: Live) -> None:
        words = [f"{name}: {live.phase}"]
        if live.samples:
            words.append(f"{live.samples}/{self._samples} samples, {live.rate:.1f}/s, {live.seconds:.1f} s")
        if math.isfinite(live.loss):
            words.append(f"loss {live.loss:.3f}")
        self._console.print(", ".join(words), markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
