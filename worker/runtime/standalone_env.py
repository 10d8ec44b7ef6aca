"""Lets other libraries take this process for one that was started alone, which to them it is.

Transformers' Trainer, Accelerate and Lightning start torch.distributed when the environment says that a process is one
of many. With servers between the workers nobody else may average gradients, so the environment must say nothing of it.

Source: accelerate/state.py, ``PartialState``; lightning/fabric/plugins/environments, ``detect``.
"""

import os

#: What a launcher says that this project needs, and under which names it keeps it.
KEPT = {"RANK": "PS_RANK", "WORLD_SIZE": "PS_WORLD"}
#: What torchrun, Slurm and MPI say besides.
OTHERS = (
    "GROUP_RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_NTASKS",
    "TORCHELASTIC_RUN_ID",
)


def alone() -> None:
    """Call this first in a script that gives its training loop to Transformers, Accelerate or Lightning.

    Takes what a launcher says of other processes out of this one's environment, and leaves of several GPUs only that of
    its local rank visible, which then is "cuda". Rank and number of workers stay known to ``ParameterServerOptimizer``.
    It has to come before anything uses CUDA or makes a ``TrainingArguments``; calling it again changes nothing.
    """
    local_rank = os.environ.get("LOCAL_RANK", "")
    for name, own in KEPT.items():
        if (value := os.environ.pop(name, "")) and not os.environ.get(own):
            os.environ[own] = value
    for name in OTHERS:
        os.environ.pop(name, None)
    if local_rank.isdecimal() and len(visible := _gpus()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local_rank) % len(visible)]


def _gpus() -> list[str]:
    """As ``$CUDA_VISIBLE_DEVICES`` names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
