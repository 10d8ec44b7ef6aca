"""Gives each worker its part of the shuffled data that Trainer, Accelerate, Lightning and Fabric read.

``torch_ps.alone`` makes each worker a trainer of its own, and trainers seed all processes alike: without this, all
workers would read the same samples in the same order. With torch.distributed these libraries put a sampler by rank into
each loader, at one place each. At these places the same is done here, by the rank in the job:

    DataLoader(shuffle=True) --> prepare_data_loader (Accelerate, Trainer) ---+--> DistributedSampler by rank
                             --> process_dataloader (Lightning, Fabric) ------+

Rules of this file
  1. Only a loader that shuffles is divided: it is one for training. Others, as those of an evaluation, stay whole,
     because each worker computes the metrics of its own evaluation.
  2. The parts are cut when the trainer takes the loader, and are equally long: as with torch.distributed, the first
     samples of an order fill up its last round. The order depends on the epoch and on ``data_seed``.
  3. Accelerate takes rank 0 for its main process from then on, so that one worker writes checkpoints and reports.
  4. Accelerate's schedulers make a step per worker at each step, as with torch.distributed: scripts count their steps
     before the loader is divided.

Source: accelerate/data_loader.py, ``prepare_data_loader``; accelerate/scheduler.py, ``AcceleratedScheduler``;
lightning/pytorch/trainer/connectors/data_connector.py, ``_process_dataloader``.
"""

import copy
import functools
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from torch_ps.worker.runtime.jobs_here import members_here

log = logging.getLogger("torch_ps.worker")

#: Modules with a ``SingleDeviceStrategy``, through which a loader goes that is for one process.
STRATEGIES = (
    "lightning.pytorch.strategies.single_device",
    "lightning.fabric.strategies.single_device",
    "pytorch_lightning.strategies.single_device",
    "lightning_fabric.strategies.single_device",
)

_num_parts = 1  # of the loader that was divided last


def install() -> None:
    """Divide the loaders of those libraries that are loaded by now; a second call changes nothing."""
    if (accelerate := sys.modules.get("accelerate.accelerator")) is not None:
        _wrap(accelerate.Accelerator, "prepare_data_loader", _prepare_accelerate)
        sys.modules["accelerate.scheduler"].AcceleratorState = _num_processes  # type: ignore[attr-defined]
    for name in STRATEGIES:
        if (strategies := sys.modules.get(name)) is not None:
            _wrap(strategies.SingleDeviceStrategy, "process_dataloader", lambda _: 0)


def _wrap(owner: Any, name: str, seed_of: Any) -> None:
    """Have the method ``name`` of a class divide the loader that is its first argument."""
    method = getattr(owner, name)
    if hasattr(method, "divides_loaders"):
        return

    @functools.wraps(method)
    def divided(self: Any, loader: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, divide(loader, seed_of(self)), *args, **kwargs)

    divided.divides_loaders = True  # type: ignore[attr-defined]
    setattr(owner, name, divided)


def _prepare_accelerate(accelerator: Any) -> int:
    """Tell Accelerate this worker's rank; returns the seed of its data."""
    states, rank = sys.modules["accelerate.state"], _place()[0]
    for shared in (states.PartialState._shared_state, states.AcceleratorState._shared_state):
        shared["process_index"] = rank
    seed: int | None = accelerator.dataloader_config.data_seed
    return seed or 0


def _num_processes() -> SimpleNamespace:
    return SimpleNamespace(num_processes=_num_parts)


def divide(loader: Any, seed: int = 0) -> Any:
    """This worker's part of a loader that shuffles; any other object as it is.

    Args:
        loader: object that a script has given to a trainer.
        seed: seed of the order, the same on all workers.
    """
    global _num_parts
    if not isinstance(loader, DataLoader) or type(loader.sampler) is not RandomSampler:
        return loader
    if loader.sampler.replacement or loader.sampler._num_samples is not None:
        return loader
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return loader
    rank, world = _place()
    _num_parts = world
    if world == 1:
        return loader
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, world, rank, seed=seed, drop_last=loader.drop_last
    )
    log.info("part %d of %d of the data: %d of %d samples", rank, world, len(sampler), len(loader.sampler))
    part = copy.copy(loader)
    changed: dict[str, Any] = {"sampler": sampler}
    if loader.batch_sampler is not None:
        changed["batch_sampler"] = BatchSampler(sampler, loader.batch_sampler.batch_size, loader.drop_last)
    for name, value in changed.items():
        object.__setattr__(part, name, value)  # a DataLoader refuses it, for the sake of loaders that are in use
    return part


def _place() -> tuple[int, int]:
    """Rank and number of workers: those of the job, or before it those of the launcher."""
    for optimizer in members_here():
        workers = optimizer.workers
        return workers.index(optimizer.name), len(workers)
    rank, world = os.environ.get("PS_RANK", ""), os.environ.get("PS_WORLD", "")
    return (int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else (0, 1)
