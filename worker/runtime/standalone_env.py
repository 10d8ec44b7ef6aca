"""Removes launcher variables (RANK, WORLD_SIZE, ...) so that other libraries do not start torch.distributed.

Transformers' Trainer, Accelerate and Lightning start torch.distributed when the environment says that a process is one
of many. The servers average the gradients and nothing else may, so the environment must not say it. Each worker still
gets its part of the data (``divided_loaders.py``).

Source: accelerate/state.py, ``PartialState``; lightning/fabric/plugins/environments, ``detect``.
"""

import os
import sys

from torch_ps.worker.runtime.torchrun_env import OF_PROCESSES

#: Launcher variables that this project needs, and the names under which it keeps them.
KEPT = {"RANK": "PS_RANK", "WORLD_SIZE": "PS_WORLD"}
#: Further variables of torchrun, ps-run, Slurm and MPI.
OTHERS = (
    *(name for name in OF_PROCESSES if name not in KEPT),
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_NTASKS",
    "TORCHELASTIC_RUN_ID",
)
#: Libraries whose trainers divide data among the processes that they know of.
TRAINERS = frozenset({"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"})

_is_alone = False


def alone() -> None:
    """Call this first in a script that gives its training loop to Transformers, Accelerate or Lightning.

    Removes from the environment what a launcher says of other processes. Of several GPUs only that of the local rank
    stays visible, as "cuda". ``ParameterServerOptimizer`` still knows the rank and the number of workers, and a loader
    that shuffles gives each worker its part of the data. Call it before anything uses CUDA or makes a
    ``TrainingArguments``; calling it again changes nothing.
    """
    global _is_alone
    _is_alone = True
    divide_loaders()
    local_rank = os.environ.get("LOCAL_RANK", "")
    for name, own in KEPT.items():
        if (value := os.environ.pop(name, "")) and not os.environ.get(own):
            os.environ[own] = value
    for name in OTHERS:
        os.environ.pop(name, None)
    if local_rank.isdecimal() and len(visible := _gpus()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local_rank) % len(visible)]


def divide_loaders() -> None:
    """After ``alone``: have the trainers that are loaded by now give each worker its part of the data."""
    if _is_alone and not TRAINERS.isdisjoint(sys.modules):
        from torch_ps.worker.runtime import divided_loaders

        divided_loaders.install()


def _gpus() -> list[str]:
    """The visible GPUs, as ``$CUDA_VISIBLE_DEVICES`` names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
