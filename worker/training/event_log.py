"""What a worker does, as a file of JSON lines that other programs follow while it grows.

    {"event": "start", "time", "name", "rank", "world", "mode", "device", "task", "parameters", "settings": {...}}
    {"event": "step", "time", "step", "samples", "job_samples", "loss", "lr", "staleness", "version", "pushed_bytes",
                      "pulled_bytes", "wait_seconds"}
    {"event": "evaluation", "time", "job_samples", "metrics": {"loss", "accuracy"}}     rank 0, after training
    {"event": "sample", "text"}                                                         rank 0, after training
    {"event": "end", "time", "steps", "samples", "pushed_bytes", "pulled_bytes", "status"}

Rules of this file
  1. Times are unix seconds; ``samples``, bytes and ``wait_seconds`` are this worker's, since its start; ``job_samples``
     are the whole job's. ``time`` of an evaluation is that of the parameters it looked at.
  2. A line is written at once and whole, so that a reader never has to guess.
  3. A board hears of the same events.
  4. A number that is not finite is null: JSON has no word for it. ``staleness`` is null where no push went out.
"""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from torch_ps.common.errors import ConfigError
from torch_ps.worker.training.tensorboard import Board


class Events:
    """The file, or nothing where no path is given. A context manager that closes it.

    Args:
        board: TensorBoard writer that gets every event too.

    Raises:
        ConfigError: the file cannot be written; says why.
    """

    def __init__(self, path: str = "", board: Board | None = None) -> None:
        self._board = board
        self._file: TextIO | None = None
        if path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  # closed by __exit__
            except OSError as error:
                raise ConfigError(f"events {path!r} cannot be written: {error.strerror or error}") from error

    def write(self, event: str, **facts: Any) -> None:
        if self._board is not None:
            self._board.note(event, facts)
        if self._file is not None:
            self._file.write(json.dumps(_finite({"event": event, **facts}), allow_nan=False) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
