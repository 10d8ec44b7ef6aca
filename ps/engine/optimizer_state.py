"""What torch's optimizers keep, as named tensors of a bucket and back.

Every optimizer that is admitted (``common/optimizer_spec.py``) keeps tensors as large as the parameters, element by
element, and counters of one number. Both are found by their shapes, so no optimizer is named here.
"""

import torch


def optimizer_state(optimizer: torch.optim.Optimizer, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch's optimizer keeps for ``parts``, which are the pieces of one bucket and step together.

    Elementwise tensors come joined, shape (numel,); counters, shape (), once.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, first in optimizer.state[parts[0]].items() if parts[0] in optimizer.state else ():
        if not isinstance(first, torch.Tensor):
            continue  # None: a buffer that these hyperparameters do not use
        several = [optimizer.state[part][name] for part in parts]
        tensors[f"state/{name}"] = (torch.cat(several) if first.dim() else first).to("cpu", copy=True)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parts: list[torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of ``optimizer_state``."""
    state: dict[str, torch.Tensor] = {
        key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith("state/")
    }
    # Where torch keeps them: beside the parameters for one kernel that steps all, else on the CPU.
    counters = parts[0].device if any(optimizer.defaults.get(each) for each in ("fused", "capturable")) else "cpu"
    at = 0
    for part in parts if state else ():
        end = at + part.numel()
        optimizer.state[part] = {
            name: tensor[at:end].to(part.device, copy=True) if tensor.dim() else tensor.to(counters, copy=True)
            for name, tensor in state.items()
        }
        at = end
