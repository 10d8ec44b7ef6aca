"""Refuses a model whose gradients torch.distributed averages already: the servers would average them once more.

In async mode every worker would then push the same mean, which the servers would apply once for each of them. Scripts
may use torch.distributed beside torch-ps for anything else: samplers, barriers, metrics.

Source: torch/nn/parallel/distributed.py; accelerate/state.py, ``PartialState``.
"""

import functools
import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_ps.common.errors import ConfigError
from torch_ps.worker.runtime.jobs_here import members_here


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


def refuse_it_later() -> None:
    """Have DistributedDataParallel refuse what an optimizer of this process trains, as scripts wrap the model last."""
    init: Any = DistributedDataParallel.__init__
    if hasattr(init, "refuses_trained"):
        return

    @functools.wraps(init)
    def refuses(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = {id(each) for each in module.parameters()}
        for optimizer in members_here():
            if any(id(each) in given for group in optimizer.param_groups for each in group["params"]):
                raise ConfigError(
                    "a torch_ps.ParameterServerOptimizer trains this model, and DistributedDataParallel would average "
                    "the gradients that the servers average: leave DistributedDataParallel out, and train the module "
                    "itself"
                )
        init(self, module, *args, **kwargs)

    refuses.refuses_trained = True  # type: ignore[attr-defined]
    DistributedDataParallel.__init__ = refuses  # type: ignore[method-assign]
