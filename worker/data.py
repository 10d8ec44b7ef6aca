"""This worker's part of the data.

    for batch in torch_ps.shard(dataset, optimizer, batch_size=32): ...

Every worker gets the same number of batches, so that no synchronous step waits for one that has run out.
"""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from torch_ps.common.errors import ConfigError
from torch_ps.worker.optimizer import ParameterServerOptimizer


class Shard:
    """The batches of one worker; iterating starts over with the same order. ``len`` counts them."""

    def __init__(self, loaders: list[DataLoader[Any]]) -> None:
        self._loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for loader in self._loaders:
            yield from loader

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders)


def shard(
    dataset: Dataset[Any],
    optimizer: ParameterServerOptimizer,
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int = 1,
    **loader: Any,
) -> Shard:
    """Split a map-style dataset by rank: each epoch a new seeded order, dealt in turn, equal parts.

    Waits until the first quorum of workers is there, for rank and number of workers follow from it.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; a list of ready-made batches will do.
        optimizer: of this worker.
        batch_size: samples per batch and worker; None gives the items of the dataset as they are.
        shuffle: False keeps the order of the dataset.
        seed: of the order; the same on every worker.
        epochs: times that the dataset is gone through.
        **loader: further arguments of ``torch.utils.data.DataLoader``, such as ``num_workers``.

    Raises:
        ConfigError: the dataset has no length, or fewer samples than there are workers.
        WaitTimeout: workers are missing.
    """
    if not isinstance(dataset, Sized):
        raise ConfigError(f"{type(dataset).__name__} has no length; torch_ps.shard needs a map-style dataset")
    if epochs < 1:
        raise ConfigError(f"epochs must be >= 1; got {epochs}")
    workers = optimizer.workers
    rank, world = workers.index(optimizer.name), len(workers)
    each = len(dataset) // world
    if each < (batch_size or 1):
        raise ConfigError(
            f"{len(dataset)} samples are too few for {world} workers with batches of {batch_size or 1}; use fewer or "
            "smaller ones"
        )
    loaders = []
    for epoch in range(epochs):
        order = torch.arange(len(dataset))
        if shuffle:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed + epoch))
        mine = order[rank : each * world : world].tolist()
        loaders.append(
            DataLoader(dataset, sampler=mine, batch_size=batch_size, drop_last=batch_size is not None, **loader)
        )
    return Shard(loaders)
