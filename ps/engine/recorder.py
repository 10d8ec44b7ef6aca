"""Where a standby hears of what is done in the lanes; the engine's side of ``torch_ps.ps.failover.primary``."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.ps.core.effects import Apply
from torch_ps.ps.engine.responses import Answer


class Recorder(Protocol):
    """Makes records of steps and answers, and holds back what has to wait until the standby has them."""

    def step(self, bucket: Bucket, apply: Apply, mean: torch.Tensor | None, hyper: Hyper) -> list[bytes]:
        """On the bucket's lane: frames about a step, made with ``mean``, None: the values have stayed."""

    def answered(self, bucket: Bucket, answer: Answer) -> list[bytes]:
        """On the bucket's lane, before the answer is encoded: frames about what the worker's copy will be."""

    def data(self) -> list[bytes]:
        """Frames about which samples are whose; none on another shard than the lead."""

    def send(self, frames: Sequence[bytes], then: Callable[[], None]) -> None:
        """Send them; ``then`` is called when the standby has them and all before them."""
