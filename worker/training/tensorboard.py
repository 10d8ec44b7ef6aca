"""--tensorboard: what a worker does, as scalars that TensorBoard and whatever reads its files show.

    DIR/w0/events.out.tfevents...    train/loss, train/lr, train/staleness, time/step_seconds, time/samples_per_second,
                                     time/wait_share, bytes/pushed, bytes/pulled; rank 0: validation/loss, /accuracy

Rules of this file
  1. ``tensorboard`` is an extra and loaded where it is asked for.
  2. The horizontal axis is the samples of the whole job, so that runs with other batches and workers can be compared.
     Points keep their wall time, those of an evaluation that of the parameters it looked at.
  3. Written by a thread of its own every few seconds; a step pays for the making of some numbers.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch_ps.common.errors import ConfigError

#: Seconds after which what was written is in the file at the latest.
FLUSH_SECONDS = 5

MISSING = "tensorboard={folder!r} needs the package of that name; install it with: pip install 'torch-ps[tensorboard]'"


def check(folder: str) -> None:
    """Refuse a folder where nothing could be written to it, before anything starts.

    Raises:
        ConfigError: the package is not there; says how to install it.
    """
    if folder and find_spec("tensorboard") is None:
        raise ConfigError(MISSING.format(folder=folder))


class Board:
    """The scalars of one worker, or nothing where no folder is given. A context manager that closes the file.

    Args:
        folder: folder of all workers; each has a folder of its own in it.
        worker: its name.

    Raises:
        ConfigError: tensorboard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: str, worker: str) -> None:
        self._writer: Any = None
        self._last: tuple[float, float, float] | None = None  # time, samples of the job, seconds waited
        check(folder)
        if folder:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(str(Path(folder, worker)), flush_secs=FLUSH_SECONDS)
            except OSError as error:
                raise ConfigError(f"tensorboard {folder!r} cannot be written: {error.strerror or error}") from error

    def note(self, event: str, facts: Mapping[str, Any]) -> None:
        """Show what of one event can be shown; see ``torch_ps.worker.training.event_log`` for their facts."""
        if self._writer is None:
            return
        if event == "step":
            self._step(**facts)
        elif event == "evaluation":
            scalars = {f"validation/{name}": value for name, value in facts["metrics"].items()}
            self._add(scalars, facts["job_samples"], facts["time"])

    def _step(
        self,
        *,
        time: float,
        job_samples: int,
        loss: float,
        lr: float,
        staleness: int | None,
        pushed_bytes: int,
        pulled_bytes: int,
        wait_seconds: float,
        **_: Any,
    ) -> None:
        scalars: dict[str, float | None] = {
            "train/loss": loss,
            "train/lr": lr,
            "train/staleness": staleness,
            "bytes/pushed": pushed_bytes,
            "bytes/pulled": pulled_bytes,
        }
        if self._last is not None and (seconds := time - self._last[0]) > 0:
            scalars["time/step_seconds"] = seconds
            scalars["time/samples_per_second"] = (job_samples - self._last[1]) / seconds
            scalars["time/wait_share"] = (wait_seconds - self._last[2]) / seconds
        self._last = time, job_samples, wait_seconds
        self._add(scalars, job_samples, time)

    def _add(self, scalars: Mapping[str, float | None], samples: int, time: float) -> None:
        for name, value in scalars.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, samples, walltime=time)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
