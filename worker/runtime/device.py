"""Chooses the device that a worker computes on, and moves batches there.

    --device, $PS_DEVICE --+
    $LOCAL_RANK -----------+--> common.device.choose --> device

torchrun, ps-run and deploy/slurm set ``$LOCAL_RANK``. Where each process sees a GPU of its own (Ray, Kubernetes, Slurm
with a GPU per task), that GPU is the device, whatever the local rank is.
"""

import os
from typing import Any

import torch

from torch_ps.common.devices import choose
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import from_environment
from torch_ps.common.options.worker_config import WorkerConfig


def device() -> torch.device:
    """The device of this worker: the GPU of its local rank where there are GPUs, else the CPU.

    ``$PS_DEVICE`` and ``--device`` of ps-worker and ps-run say otherwise. With more workers than GPUs on a host they
    share them in turn. A GPU becomes torch's current one, so that "cuda" means it too and no other one is touched.

    Raises:
        ConfigError: a GPU is asked for that is not there, or ``$LOCAL_RANK`` is no number.
    """
    found = choose(from_environment(WorkerConfig, os.environ).device, local_rank())
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def local_rank() -> int:
    """Place of this worker on its host, as its launcher says; 0 if none does.

    Raises:
        ConfigError: ``$LOCAL_RANK`` is no number.
    """
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdecimal():
        raise ConfigError(f"$LOCAL_RANK must be a whole number >= 0; got {text!r}")
    return int(text)


def move(batch: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with every tensor on ``device``."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move(item, device) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(item, device) for item in batch)
    return batch


def samples_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor that has one; 1 where there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return next((samples_of(item) for item in items if _holds_tensor(item)), 1)


def _holds_tensor(item: Any) -> bool:
    if isinstance(item, dict):
        item = tuple(item.values())
    return isinstance(item, torch.Tensor) or (isinstance(item, list | tuple) and any(map(_holds_tensor, item)))
