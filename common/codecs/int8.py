"""int8: 1 byte per value and one fp32 scale per block of 256, 3.94 times smaller than fp32.

    payload: [ scale of each block | a byte per value ]        value = scale * byte,  -127 <= byte <= 127

The error of a value is at most 1/254 of the largest magnitude in its block. That is far below the noise of a gradient,
so no error feedback is needed; it is too coarse for parameters, which are therefore pulled as differences.

Source: Dettmers, ICLR 2016, arXiv:1511.04561, and its block-wise form, Dettmers et al., ICLR 2022, arXiv:2110.02861.
"""

import numpy as np
import torch

from torch_ps.common.codecs.plain import bytes_of, check_size
from torch_ps.common.errors import CorruptFrame
from torch_ps.common.wire.frames import Buffer

#: Values that share a scale.
BLOCK = 256
#: Least magnitude that a scale is computed from, so that scale and reciprocal are normal numbers.
_SMALLEST = 1e-30


def blocks_of(values: torch.Tensor, block: int) -> torch.Tensor:
    """``values`` as rows of ``block``, the last row padded with zeros; a view if no padding is needed."""
    short = -values.numel() % block
    return (torch.nn.functional.pad(values, (0, short)) if short else values).view(-1, block)


def check_scales(name: str, scales: memoryview) -> None:
    """Refuse scales that are negative, infinite or NaN.

    Raises:
        CorruptFrame: a scale is; names the first of them.
    """
    found = np.frombuffer(scales, np.float32)
    wrong = ~(np.isfinite(found) & (found >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise CorruptFrame(f"{name} payload has the scale {found[first]} for block {first}; it must be finite and >= 0")


class Int8:
    """One signed byte per value, rounded to a multiple of its block's scale."""

    name = "int8"
    biased, coarse, sparse = False, True, False

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        rows = blocks_of(values, BLOCK)
        largest = rows.abs().amax(1, keepdim=True).clamp_min_(_SMALLEST)
        steps = torch.mul(rows, 127 / largest).round_().to(torch.int8)
        return bytes_of(largest.div_(127).view(-1)), bytes_of(steps.view(-1)[: values.numel()])

    def check(self, payload: memoryview, numel: int) -> None:
        scales = 4 * -(-numel // BLOCK)
        check_size(self.name, payload, scales + numel)
        check_scales(self.name, payload[:scales])

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        numel = scratch.numel()
        num_blocks = -(-numel // BLOCK)
        scales = torch.frombuffer(payload, dtype=torch.float32, count=num_blocks)
        scratch.copy_(torch.frombuffer(payload, dtype=torch.int8, offset=4 * num_blocks))
        whole = numel // BLOCK * BLOCK
        scratch[:whole].view(-1, BLOCK).mul_(scales[: numel // BLOCK, None])
        if whole < numel:
            scratch[whole:].mul_(scales[-1])
        return scratch
