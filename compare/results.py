"""The format of results.json, version 1: settings, results and failures of a comparison.

Rules of this file
  1. The dataclasses define the format: their field names are the names in the file, their docstrings give the units.
  2. A number that does not exist (no accuracy, target not reached, loss diverged) is null, never NaN.
  3. Reading checks version and types; unknown fields are skipped.

    Results
    +-- settings           settings of all runs: task, data, workers, samples, seed, rule of the learning rate, ...
    +-- runs: RunResult    one per finished run: figures, curves, workers, text, command
    +-- failures: Failure  runs that did not finish, and why
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_ps.common.errors import ConfigError

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Lowest and highest value among several seeds."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Validation metrics of the parameters ``seconds`` after the start of training.

    ``samples`` counts those of the job, ``bytes`` those pushed and pulled so far by one worker, on average.
    """

    seconds: float
    samples: int
    bytes: int
    loss: float | None
    accuracy: float | None = None
    loss_range: Range | None = None
    accuracy_range: Range | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPoint:
    """Mean training loss of all workers' steps since the previous point; other fields as in ``CurvePoint``."""

    seconds: float
    samples: int
    bytes: int
    loss: float | None
    loss_range: Range | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Ranges of the figures of several seeds."""

    validation_loss: Range | None = None
    validation_accuracy: Range | None = None
    samples_per_second: Range | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Staleness:
    """Staleness in versions over all pushes of all workers; ``histogram`` counts pushes by staleness."""

    mean: float
    max: int
    histogram: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes of the whole run per worker, on average; payloads and headers as the worker counts them."""

    pushed_per_worker: int
    pulled_per_worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDetail:
    """One worker's share of a run. ``seconds`` - ``wait_seconds`` is the time that it computed."""

    name: str
    steps: int
    samples: int
    seconds: float
    wait_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One finished run. ``seconds`` is the wall-clock time of training, without evaluation.

    ``command`` repeats the run. With several ``seeds`` it has a line for each, figures and curves are means over the
    seeds, and ``spread`` and the ranges give their lowest and highest values.
    """

    name: str
    mode: str
    compress: str
    compress_pull: str
    lr: float
    workers: int
    batch_size: int
    samples: int
    seconds: float
    samples_per_second: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds_to_target: float | None
    staleness: Staleness
    bytes: Bytes
    curve: list[CurvePoint]
    training: list[TrainingPoint]
    workers_detail: list[WorkerDetail]
    text: str | None
    command: str
    seeds: list[int] = field(default_factory=list)
    spread: Spread | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A run that did not finish: the reason, and the path of its log."""

    name: str
    reason: str
    log: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One comparison."""

    version: int = VERSION
    task: str
    created: str
    settings: dict[str, Any]
    target_loss: float | None
    runs: list[RunResult]
    failures: list[Failure] = field(default_factory=list)


def to_json(results: Results) -> str:
    return json.dumps(_finite(dataclasses.asdict(results)), indent=1, allow_nan=False)


def from_json(text: str, *, name: str = "results.json") -> Results:
    """Read what ``to_json`` wrote.

    Raises:
        ConfigError: the text is not JSON or of another version, or a field is missing or has the wrong type.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise ConfigError(f"{name} has version {version!r}; this ps-compare reads version {VERSION}")
    loaded: Results = _load(Results, record, name)
    return loaded


def write(results: Results, path: Path) -> None:
    path.write_text(to_json(results) + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return from_json(text, name=str(path))


def finite(value: float | None) -> float | None:
    """``value`` if it is finite, else None."""
    return value if value is not None and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def _load(wanted: Any, value: Any, where: str) -> Any:
    """Build ``wanted`` (a dataclass, list, dict, union or plain type) from parsed JSON."""
    if wanted is Any:
        return value
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return None if value is None and type(None) in arguments else _load(arguments[0], value, where)
    if dataclasses.is_dataclass(wanted):
        _expect(dict, value, where)
        hints = typing.get_type_hints(wanted)
        found = {}
        for item in dataclasses.fields(wanted):
            if item.name in value:
                found[item.name] = _load(hints[item.name], value[item.name], f"{where}: {item.name}")
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{where} lacks {item.name!r}")
        return wanted(**found)  # type: ignore[operator]  # is_dataclass does not say that it is a class
    if origin is list:
        _expect(list, value, where)
        return [_load(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        _expect(dict, value, where)
        return {key: _load(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _expect(wanted, value, where)
    return value


def _expect(wanted: type, value: Any, where: str) -> None:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{where} should be {wanted.__name__}, not {type(value).__name__}")
