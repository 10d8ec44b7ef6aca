"""Endless shuffled index sampler: N workers together read the batches that one worker would read.

    order of one epoch after the other   | 7 2 9 4 | 0 5 8 1 | 3 6 ...
    two workers, two samples a batch       w0: 7 2   w0: 0 5
                                           w1: 9 4   w1: 8 1
    one worker, four samples a batch       7 2 9 4   0 5 8 1

Batch k of rank r of N workers with B samples is positions (k N + r) B to (k N + r + 1) B of that order. So a
synchronous step of N workers sees the samples of one process with N times the batch size, for every N.
"""

from collections.abc import Iterator

import torch

from torch_ps.common.errors import ConfigError


def shuffled(size: int, rank: int, world: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of one worker's batches; in one epoch all workers together get each index once.

    Args:
        size: number of samples, >= 1.
        rank: rank of this worker, 0 <= rank < world.
        world: number of workers that share the samples.
        batch_size: indices per batch, >= 1; the epoch need not be a multiple of it.
        seed: seed of the order, together with the number of the epoch.

    Yields:
        shape (batch_size,), int64, 0 <= index < size.
    """
    check(rank, world, batch_size)
    epoch, order = 0, torch.empty(0, dtype=torch.int64)
    whole = world * batch_size
    while True:
        while len(order) < whole:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.cat([order, torch.randperm(size, generator=generator)])
            epoch += 1
        yield order[rank * batch_size : (rank + 1) * batch_size]
        order = order[whole:]


def drawn(size: int, rank: int, world: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices drawn with replacement, for windows anywhere in a long text; arguments as ``shuffled``."""
    check(rank, world, batch_size)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randint(size, (world * batch_size,), generator=generator)
        yield order[rank * batch_size : (rank + 1) * batch_size]


def check(rank: int, world: int, batch_size: int) -> None:
    """Check rank and batch size.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"a rank must be between 0 and {world - 1}, as there are {world} workers; got {rank}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be >= 1; got {batch_size}")
