"""Refuses a model whose gradients torch.distributed averages already: the servers would average them once more.

In async mode every worker would then push the same mean, which the servers would apply once for each of them. Scripts
may use torch.distributed beside torch-ps for anything else: samplers, barriers, metrics.

Source: torch/nn/parallel/distributed.py; accelerate/state.py, ``PartialState``.
"""

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_ps.common.errors import ConfigError


def refuse_other_averaging(model: nn.Module) -> None:
    """Check that neither ``model`` nor the library that will train it averages gradients.

    Raises:
        ConfigError: one of them does; says which, and what to do.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel, which averages the gradients that the servers average: "
            "give torch_ps.ParameterServerOptimizer the module itself, and train that"
        )
    accelerate = sys.modules.get("accelerate.state")
    state = accelerate.PartialState._shared_state if accelerate is not None else {}
    if state.get("backend") is not None and state.get("num_processes", 1) > 1:
        raise ConfigError(
            "Accelerate has started torch.distributed and would average the gradients that the servers average: call "
            "torch_ps.alone() first, before a TrainingArguments or an Accelerator is made"
        )
