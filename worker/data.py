"""This worker's part of the data.

for batch in torch_ps.shard(dataset, optimizer, batch_size=32): ...

leased   the lead gives out samples as workers need them: each is trained on once an epoch, though workers come and go
static   equal parts by rank, cut once: needs no server while it is read
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any, Literal, overload

from torch.utils.data import DataLoader, Dataset

from torch_ps.common.errors import ConfigError
from torch_ps.worker.leased_data import LOADER_OPTIONS, LeasedShard, order_of
from torch_ps.worker.optim.optimizer import ParameterServerOptimizer

SPLITS = ("leased", "static")


#: Arguments of a DataLoader that choose samples, which the servers or the rank do here.
_CHOOSES = frozenset({"sampler", "batch_sampler"})


class StaticShard:
    """The batches of one worker; iterating starts over with the same order. ``len`` counts them.

    It has the attributes of a ``DataLoader``: ``dataset``, ``batch_size``, ``num_workers`` and the like; with one epoch
    also ``sampler`` and ``batch_sampler``.

    Args:
        make: Function that returns the loader of one epoch.
        epochs: epochs of one iteration.
        batch_size: samples per batch; None gives the items of the dataset as they are.
    """

    def __init__(self, make: Callable[[int], DataLoader[Any]], epochs: int, batch_size: int | None) -> None:
        self._make, self._epochs = make, epochs
        self.batch_size, self.drop_last = batch_size, batch_size is not None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Deal the order of an epoch, counted from 0, and of those after it."""
        self._loaders = [self._make(epoch + number) for number in range(self._epochs)]

    def __getattr__(self, name: str) -> Any:
        if name in LOADER_OPTIONS or name == "dataset" or (name in _CHOOSES and self._epochs == 1):
            return getattr(self._loaders[0], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[Any]:
        for loader in self._loaders:
            yield from loader

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders)


@overload
def shard(
    dataset: Dataset[Any],
    optimizer: ParameterServerOptimizer,
    *others: ParameterServerOptimizer,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int = 1,
    drop_last: bool = False,
    split: Literal["leased"] = "leased",
    name: str = "",
    **loader: Any,
) -> LeasedShard: ...


@overload
def shard(
    dataset: Dataset[Any],
    optimizer: ParameterServerOptimizer,
    *others: ParameterServerOptimizer,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int = 1,
    drop_last: bool = False,
    split: Literal["static"],
    name: str = "",
    **loader: Any,
) -> StaticShard: ...


def shard(
    dataset: Dataset[Any],
    optimizer: ParameterServerOptimizer,
    *others: ParameterServerOptimizer,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int = 1,
    drop_last: bool = False,
    split: str = "leased",
    name: str = "",
    **loader: Any,
) -> LeasedShard | StaticShard:
    """This worker's part of a map-style dataset, which every worker of the job passes as a whole.

    With ``split="leased"`` the lead gives out the samples of an epoch, in a seeded order that is new each epoch, a few
    batches at a time. Every sample is in exactly one push that was applied: what a worker had and did not push when it
    left, died or was dropped goes to the others. An epoch ends for all workers together. In sync mode batch k of N
    workers is what batch k of one process with N times the batch size is, and the same worker gets the same samples in
    every run; in async mode fast workers get more. The last batches of an epoch may be smaller. A worker that has
    none left while others have takes part in their steps with weight 0. All workers of a synchronous job have to read.

    With ``split="static"`` the order is dealt by rank once: equal parts, what does not fit is left out, and what a
    worker that dies had is lost. Waits until the first quorum of workers is there, for ranks follow from it.

    Args:
        dataset: object with ``__len__`` and ``__getitem__``, such as a list of ready-made batches.
        optimizer: optimizer of this worker. With "leased" and a ``batch_size``, its ``weight`` is the size of the batch
            while the loop reads, and afterwards what it was before.
        *others: optimizers of this worker's other models, as in ``torch_ps.shard(data, opt_d, opt_g, batch_size=4)``;
            by default all of this process that are in other jobs. Each gets the weight of the batch, and while this
            worker has no samples left it takes part in their steps as in those of ``optimizer``, whose job counts the
            samples.
        batch_size: samples per batch and worker; None gives the items of the dataset as they are.
        shuffle: whether each epoch has an order of its own; False keeps the order of the dataset.
        seed: seed of the order; the same on every worker.
        epochs: number of passes over the dataset. With "leased" they are the job's, counted from its first: a worker
            that joins in the third of five helps with the third to the fifth. Iterating again goes on with those after.
        drop_last: whether batches of less than ``batch_size`` samples are left out; with "static" they always are. With
            "leased" their samples count as seen.
        split: "leased" or "static".
        name: name of the dataset, where two in one job are equally long and have the same seed; with "leased" only.
        **loader: further arguments of ``torch.utils.data.DataLoader``, such as ``num_workers``.

    Raises:
        ConfigError: the dataset has no length, or fewer samples than there are workers, or an argument chooses samples.
        WaitTimeout: workers are missing.
    """
    if not isinstance(dataset, Sized):
        raise ConfigError(f"{type(dataset).__name__} has no length; torch_ps.shard needs a map-style dataset")
    for what, number in (("epochs", epochs), ("batch_size", batch_size or 1), ("samples of the dataset", len(dataset))):
        if number < 1:
            raise ConfigError(f"{what} must be >= 1; got {number}")
    if chooses := sorted(_CHOOSES & loader.keys()):
        raise ConfigError(
            f"{chooses[0]}= is not for torch_ps.shard, which gives each worker its samples; choose samples in the "
            "dataset (torch.utils.data.Subset) or a DataLoader with a sampler by optimizer.rank and optimizer.world"
        )
    if drop_last and batch_size is None:
        raise ConfigError("drop_last=True needs a batch_size")
    if split == "leased":
        return LeasedShard(
            dataset,
            optimizer,
            others,
            len(dataset),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            epochs=epochs,
            drop_last=drop_last,
            name=name,
            loader=loader,
        )
    if split != "static":
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if name:
        raise ConfigError(f"name={name!r} is for split leased; a static split asks nobody")
    workers = optimizer.workers
    rank, world = workers.index(optimizer.name), len(workers)
    each = len(dataset) // world
    if each < (batch_size or 1):
        raise ConfigError(
            f"{len(dataset)} samples are too few for {world} workers with batches of {batch_size or 1}; use fewer or "
            "smaller ones"
        )

    def make(epoch: int) -> DataLoader[Any]:
        mine = order_of(len(dataset), shuffle=shuffle, seed=seed + epoch)[rank : each * world : world].tolist()
        return DataLoader(dataset, sampler=mine, batch_size=batch_size, drop_last=batch_size is not None, **loader)

    return StaticShard(make, epochs, batch_size)
