"""How a batch gets to the device that a worker computes on (``common.device`` says which that is)."""

from typing import Any

import torch


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
