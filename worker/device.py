"""Which device a worker computes on, and how a batch gets there."""

from typing import Any

import torch

from torch_ps.common.errors import ConfigError


def choose(wanted: str, local_rank: int = 0) -> torch.device:
    """The device that ``--device`` means.

    Args:
        wanted: auto, cpu, cuda or cuda:N. "auto" is the GPU of the local rank where there are GPUs, else the CPU.
        local_rank: place of this worker on its host. With more workers than GPUs they share them in turn.

    Raises:
        ConfigError: a GPU that is not there; says which are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = wanted.partition(":")
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise ConfigError(f"device {wanted}: torch {torch.__version__} finds no GPU here; use --device auto or cpu")
    index = int(number) if number else local_rank % count
    if index >= count:
        here = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"device {wanted}: this host has {count} GPU{'s' * (count > 1)}, {here}")
    return torch.device("cuda", index)


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
