"""Mixed precision of the ready-made tasks: what ``--precision`` means in a training loop.

    fp32   nothing happens here
    bf16   the loss is computed under autocast; bf16 has the range of fp32, so nothing has to be scaled
    fp16   the same in fp16, and a GradScaler keeps small gradients from vanishing; a step that overflows is skipped

The parameters stay in fp32, and so does all that travels.

Source: Micikevicius et al., ICLR 2018, arXiv:1710.03740; https://docs.pytorch.org/docs/stable/amp.html
"""

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How one worker computes.

    Args:
        name: fp32, bf16 or fp16.
        device: device on which the loss is computed.
        accumulate: backward passes per optimizer step, here or on the server; the scale changes between these alone.
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
            optimizer.step()  # only counts; the scaler is for the one that pushes
            return
        self._scaler.step(optimizer)
        self._scaler.update()
