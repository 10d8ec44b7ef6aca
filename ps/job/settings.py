"""The settings of one shard's part of a job."""

from dataclasses import dataclass

import torch

from torch_ps.ps.core.modes import Mode
from torch_ps.ps.engine.parameter_store import CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What is fixed from the start of a server to its end.

    Attributes:
        mode: Mode of the job.
        index: Index of this shard; 0 is the lead.
        num_shards: Number of shards of the job.
        quorum: Number of workers with which the first step may close.
        lease: Seconds of silence after which a worker is dropped, > 0.
        bucket_bytes: Largest size of a bucket in bytes of fp32.
        max_workers: Largest number of members of the roster.
        clip_norm: Largest norm of an update; 0 clips none.
        device: Device of the parameters and the optimizer state.
        apply_threads: Number of threads that apply gradients, >= 1.
    """

    mode: Mode
    index: int
    num_shards: int
    quorum: int
    lease: float
    bucket_bytes: int
    max_workers: int = 256
    clip_norm: float = 0.0
    device: torch.device = CPU
    apply_threads: int = 1
