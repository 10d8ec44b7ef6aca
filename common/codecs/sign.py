"""sign: 1 bit per value and one fp32 scale per block of 4096, 31.75 times smaller than fp32.

    payload: [ scale of each block | a bit per value, 1 for negative, lowest bit first ]        value = +-scale

The scale is the mean magnitude of the block, which minimises the squared error of the decoded block. Training diverges
without error feedback where the sign of the mean is not the mean of the signs; with feedback it converges.

Source: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv:1901.09847, for the scale and the feedback.
"""

import numpy as np
import torch

from torch_ps.common.codecs.int8 import blocks_of, check_scales
from torch_ps.common.codecs.plain import bytes_of, check_size
from torch_ps.common.wire.frames import Buffer

#: Values that share a scale.
BLOCK = 4096
#: Byte -> its eight signs.
_SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)


class Sign:
    """The sign of each value times the mean magnitude of its block."""

    name = "sign"
    biased, coarse, sparse = True, True, False

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        scales = blocks_of(values, BLOCK).abs().sum(1)
        scales[: values.numel() // BLOCK] /= BLOCK
        if values.numel() % BLOCK:
            scales[-1] /= values.numel() % BLOCK
        scales.clamp_max_(torch.finfo(torch.float32).max)  # a sum may overflow where no value does
        return bytes_of(scales), np.packbits(values.numpy() < 0, bitorder="little").data

    def check(self, payload: memoryview, numel: int) -> None:
        scales = 4 * -(-numel // BLOCK)
        check_size(self.name, payload, scales + -(-numel // 8))
        check_scales(self.name, payload[:scales])

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        numel = scratch.numel()
        num_blocks = -(-numel // BLOCK)
        scales = torch.frombuffer(payload, dtype=torch.float32, count=num_blocks)
        packed = np.frombuffer(payload, np.uint8, offset=4 * num_blocks)
        out = scratch.numpy()
        eights = numel // 8
        np.take(_SIGNS, packed[:eights], axis=0, out=out[: 8 * eights].reshape(eights, 8), mode="clip")
        if numel % 8:
            out[8 * eights :] = _SIGNS[packed[-1]][: numel % 8]
        whole = numel // BLOCK * BLOCK
        scratch[:whole].view(-1, BLOCK).mul_(scales[: numel // BLOCK, None])
        if whole < numel:
            scratch[whole:].mul_(scales[-1])
        return scratch
