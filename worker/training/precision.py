"""Mixed precision of the ready-made tasks: the option ``--precision``.

    fp32   no autocast
    bf16   the loss is computed under autocast; bf16 has the range of fp32, so the loss is not scaled
    fp16   the same in fp16; a GradScaler scales the loss against underflow and skips steps that overflow

Parameters, pushes and pulls stay in fp32.

Source: Micikevicius et al., ICLR 2018, arXiv:1710.03740; https://docs.pytorch.org/docs/stable/amp.html
"""

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast and loss scaling of one worker.

    Args:
        name: fp32, bf16 or fp16.
        device: device on which the loss is computed.
        accumulate: backward passes per push; the scale changes only between pushes.
    """

    def __init__(self, name: str, device: torch.device, accumulate: int = 1) -> None:
        self._device, self._dtype, self._accumulate = device.type, _DTYPES.get(name), accumulate
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self._steps = 0

    def autocast(self) -> torch.autocast:
        """The context in which the loss is computed."""
        return torch.autocast(self._device, dtype=self._dtype, enabled=self._dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(self._scaler.scale(loss))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._steps += 1
        if self._steps % self._accumulate:
            optimizer.step()  # accumulates; the scaler handles the pass that pushes
            return
        self._scaler.step(optimizer)
        self._scaler.update()
