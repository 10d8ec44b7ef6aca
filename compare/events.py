"""Reader of the workers' event logs: one JSON object per line, one file per worker.

Rules of this file
  1. A line is read once and becomes a frozen dataclass, or an error that names file and line.
  2. An incomplete last line is not an error: it is read when its end has been written.
  3. Unknown kinds of event and unknown fields are skipped, so that workers may write more than is read here.

    events/w0.jsonl --Tail.read()--> Start, Step, Step, ... Evaluation, Sample, End --collect()--> Journal

Times are Unix seconds; byte counts and ``samples`` of a worker are cumulative.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_ps.common.errors import PsError


class EventError(PsError):
    """A line of an event log that is not an event."""


@dataclass(frozen=True, slots=True)
class Start:
    """A worker is ready for its first step."""

    time: float
    name: str
    rank: int
    world: int
    mode: str
    device: str
    task: str
    parameters: int
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One completed step. ``staleness`` is None if the step pushed nothing (accumulation)."""

    time: float
    step: int
    samples: int
    job_samples: int
    loss: float
    staleness: int | None
    pushed_bytes: int
    pulled_bytes: int
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Validation metrics of the parameters as they were at ``time``; computed after training."""

    time: float
    job_samples: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """Text that the trained model generated."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The worker's training clock stopped at ``time``."""

    time: float
    steps: int
    samples: int
    pushed_bytes: int
    pulled_bytes: int
    status: str


Event = Start | Step | Evaluation | Sample | End


@dataclass(slots=True)
class Journal:
    """All events of one worker."""

    start: Start
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    text: str | None = None
    end: End | None = None

    @property
    def samples(self) -> int:
        return self.end.samples if self.end else (self.steps[-1].samples if self.steps else 0)


class Tail:
    """Reads a growing file of events, each line once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._line = 0

    def read(self) -> list[Event]:
        """Read the events whose lines were completed since the last call; none while there is no file.

        Raises:
            EventError: a complete line is not an event.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found: list[Event] = []
        for line in whole.splitlines():
            self._line += 1
            if line.strip() and (event := self._parse(line)) is not None:
                found.append(event)
        return found

    def _parse(self, line: bytes) -> Event | None:
        try:
            record = json.loads(line)
            make = _MAKE.get(record["event"])
            return make(record) if make else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is not an event: {error}"
            raise EventError(f"{self.path}, line {self._line} {what}") from error


def collect(events: Iterable[Event]) -> Journal | None:
    """Collect the events of one worker; None if it has not started."""
    journal: Journal | None = None
    for event in events:
        if isinstance(event, Start):
            journal = Journal(event)
        elif journal is None:
            continue
        elif isinstance(event, Step):
            journal.steps.append(event)
        elif isinstance(event, Evaluation):
            journal.evaluations.append(event)
        elif isinstance(event, Sample):
            journal.text = event.text
        else:
            journal.end = event
    return journal


def read_journals(folder: Path) -> list[Journal]:
    """The journals of one run, in rank order, from every ``*.jsonl`` in ``folder``."""
    journals = [collect(Tail(path).read()) for path in sorted(folder.glob("*.jsonl"))]
    return sorted((j for j in journals if j), key=lambda journal: journal.start.rank)


def _start(r: dict[str, Any]) -> Start:
    return Start(
        time=_number(r["time"]),
        name=str(r["name"]),
        rank=int(r["rank"]),
        world=int(r["world"]),
        mode=str(r["mode"]),
        device=str(r.get("device", "")),
        task=str(r.get("task", "")),
        parameters=int(r.get("parameters", 0)),
        settings=dict(r.get("settings") or {}),
    )


def _step(r: dict[str, Any]) -> Step:
    staleness = r.get("staleness")
    return Step(
        time=_number(r["time"]),
        step=int(r["step"]),
        samples=int(r["samples"]),
        job_samples=int(r["job_samples"]),
        loss=_metric(r["loss"]),
        staleness=None if staleness is None else int(staleness),
        pushed_bytes=int(r["pushed_bytes"]),
        pulled_bytes=int(r["pulled_bytes"]),
        wait_seconds=_number(r["wait_seconds"]),
    )


def _evaluation(r: dict[str, Any]) -> Evaluation:
    metrics = {str(name): _metric(value) for name, value in r["metrics"].items()}
    metrics["loss"] = metrics.get("loss", math.nan)
    return Evaluation(time=_number(r["time"]), job_samples=int(r["job_samples"]), metrics=metrics)


def _sample(r: dict[str, Any]) -> Sample:
    return Sample(str(r["text"]))


def _end(r: dict[str, Any]) -> End:
    return End(
        time=_number(r["time"]),
        steps=int(r["steps"]),
        samples=int(r["samples"]),
        pushed_bytes=int(r["pushed_bytes"]),
        pulled_bytes=int(r["pulled_bytes"]),
        status=str(r.get("status", "ok")),
    )


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _metric(value: Any) -> float:
    """Read a metric that may be infinite, or null for NaN: a run that diverged has a result too."""
    return math.nan if value is None else float(value)


_MAKE: dict[str, Callable[[dict[str, Any]], Event]] = {
    "start": _start,
    "step": _step,
    "evaluation": _evaluation,
    "sample": _sample,
    "end": _end,
}
