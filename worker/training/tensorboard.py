"""--tensorboard: writes the events of a worker as scalars to a TensorBoard event file.

    DIR/w0/events.out.tfevents...    train/loss, train/lr, train/staleness, time/step_seconds, time/samples_per_second,
                                     time/wait_share, bytes/pushed, bytes/pulled; rank 0: validation/loss, /accuracy

Rules of this file
  1. ``tensorboard`` is an optional package, imported only if the option is given.
  2. The horizontal axis counts samples of the whole job, so runs with other batch sizes and numbers of workers compare.
     Each point has its wall time; that of an evaluation is when its parameters were copied.
  3. TensorBoard's own thread writes the file every ``FLUSH_SECONDS``; a step pays only for computing the numbers.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch_ps.common.errors import ConfigError

#: Longest time in seconds until a scalar is in the file.
FLUSH_SECONDS = 5

MISSING = "tensorboard={folder!r} needs the package tensorboard; install it: pip install 'torch-ps[tensorboard]'"


def check(folder: str) -> None:
    """Check before anything starts that the package is installed, if ``folder`` is given.

    Raises:
        ConfigError: the package is missing; the message says how to install it.
    """
    if folder and find_spec("tensorboard") is None:
        raise ConfigError(MISSING.format(folder=folder))


class TensorBoard:
    """Writes the scalars of one worker. A context manager that closes the file.

    Args:
        folder: folder of the job, in which each worker has its own; "" writes nothing.
        worker: name of the worker.

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

    def write(self, event: str, facts: Mapping[str, Any]) -> None:
        """Write the scalars of one event; ``torch_ps.worker.training.event_log`` lists events and their fields."""
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
