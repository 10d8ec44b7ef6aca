"""Event log of a worker: a file of JSON lines that other programs can follow while it grows.

    {"event": "start", "time", "name", "rank", "world", "mode", "device", "task", "parameters", "settings": {...}}
    {"event": "step", "time", "step", "samples", "job_samples", "loss", "lr", "staleness", "version", "pushed_bytes",
                      "pulled_bytes", "wait_seconds"}
    {"event": "evaluation", "time", "job_samples", "metrics": {"loss", "accuracy"}}     rank 0, after training
    {"event": "sample", "text"}                                                         rank 0, after training
    {"event": "end", "time", "steps", "samples", "pushed_bytes", "pulled_bytes", "status"}

Rules of this file
  1. Times are unix seconds; ``samples``, bytes and ``wait_seconds`` are this worker's, since its start; ``job_samples``
     are the whole job's. ``time`` of an evaluation is when its parameters were copied.
  2. Each line is written whole and flushed at once, so a reader never has to guess whether it is complete.
  3. The TensorBoard writer receives the same events.
  4. A number that is not finite is null, as JSON has no NaN. ``staleness`` is null for a step without a push.
"""

import json
import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.worker.training.tensorboard import TensorBoard

log = logging.getLogger("torch_ps.worker")


class EventLog:
    """Writes events to a file. A context manager that closes it.

    A file that cannot be written any more, as where a disk is full, ends no training: later events are lost, and
    leaving the context says so.

    Args:
        path: file to write; "" writes none.
        board: writer that receives every event too; None for none.

    Raises:
        ConfigError: the file cannot be written; the message says why.
        PsError: on leaving the context, events were lost.
    """

    def __init__(self, path: str = "", board: TensorBoard | None = None) -> None:
        self._board, self._path, self._lost = board, path, ""
        self._file: TextIO | None = None
        if path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  # closed by __exit__
            except OSError as error:
                raise ConfigError(f"events {path!r} cannot be written: {error.strerror or error}") from error

    def write(self, event: str, **facts: Any) -> None:
        if self._board is not None:
            self._board.write(event, facts)
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(_finite({"event": event, **facts}), allow_nan=False) + "\n")
        except OSError as error:
            self._lost = f"events {self._path!r} cannot be written any more: {error.strerror or error}"
            log.error("%s; training goes on, and later events are lost", self._lost)
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._lost and kind is None:
            raise PsError(f"{self._lost}; the training itself has ended well, so make room or give another --events")

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # of what it had not written yet
                self._lost = self._lost or f"events {self._path!r} cannot be written: {error.strerror or error}"


def _finite(value: Any) -> Any:
    """``value`` with None for every float that is not finite, in nested dicts too."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
