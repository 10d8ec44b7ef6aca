"""Codecs that send every value: fp32 unchanged, fp16 and bf16.

Rules of this file
  1. Non-finite values stay non-finite: a gradient that overflowed is sent with one of these, so the server sees it.
  2. Each runs on a GPU too, see ``on_gpu.py``.
  3. Payloads are little-endian, as are all machines that torch runs on.
  4. ``encode_parts`` gives the bytes of values that lie in several tensors, one after the other, and only reads them.
"""

import math
import struct
import warnings
from collections.abc import Sequence

import torch

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.wire.frames import Buffer

# Payloads are read-only views of received messages, and nothing here writes to one. torch warns at the first such view
# in a process; provoke that warning here, so that no warning filter of the caller can turn it into an error later.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)


class Plain:
    """fp32 unchanged: 4 bytes per value, no loss."""

    name = "none"
    biased = coarse = sparse = False

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        return (bytes_of(values),)

    def encode_parts(self, parts: Sequence[torch.Tensor]) -> tuple[Buffer, ...]:
        return tuple([bytes_of(part) for part in parts])

    def check(self, payload: memoryview, numel: int) -> None:
        check_size(self.name, payload, 4 * numel)

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(payload, dtype=torch.float32)

    def to_bytes(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (values.view(torch.uint8),)

    def from_bytes(self, payload: memoryview, raw: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        return raw.view(torch.float32)


class Fp16:
    """IEEE half precision with one power-of-two scale per bucket: 2 bytes per value and 4 for the scale.

    The scale moves the largest magnitude to just below 2**15, so values above 65504 and below 6e-8 survive, and full
    precision (11 bits) reaches 29 binades below the largest value. Scaling by a power of two is exact. A bucket that
    holds an infinity or a NaN goes unscaled and stays non-finite.

    Source: loss scaling per tensor, Micikevicius et al., ICLR 2018, arXiv:1710.03740.
    """

    name = "fp16"
    biased = coarse = sparse = False
    _scale = struct.Struct("<f")

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        return self.encode_parts((values,))

    def encode_parts(self, parts: Sequence[torch.Tensor]) -> tuple[Buffer, ...]:
        bounds = [bound.abs().item() for part in parts for bound in torch.aminmax(part)]
        largest, scale = max(bounds), 1.0
        if all(map(math.isfinite, bounds)) and largest > 0:
            # The reciprocal has to be a normal fp32 number too.
            scale = math.ldexp(1.0, min(max(15 - math.frexp(largest)[1], -126), 126))
        halves = [torch.mul(part, scale).half() if scale != 1.0 else part.half() for part in parts]
        return self._scale.pack(scale), *map(bytes_of, halves)

    def check(self, payload: memoryview, numel: int) -> None:
        check_size(self.name, payload, self._scale.size + 2 * numel)
        (scale,) = self._scale.unpack_from(payload)
        if not (math.isfinite(scale) and scale > 0):
            raise CorruptFrame(f"fp16 payload has the scale {scale}; a positive finite number is needed")

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        (scale,) = self._scale.unpack_from(payload)
        scratch.copy_(torch.frombuffer(payload, dtype=torch.float16, offset=self._scale.size))
        return scratch.mul_(1.0 / scale) if scale != 1.0 else scratch

    def to_bytes(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = torch.aminmax(values)
        bits = torch.maximum(low.abs(), high.abs()).view(torch.int32)
        exponent = bits >> 23  # that of math.frexp plus 126; smaller for a subnormal, where the clamp decides
        shift = (15 + 126 - exponent).clamp(-126, 126)
        usual = (bits > 0) & (exponent < 255)  # neither all zero nor infinite
        scale = ((torch.where(usual, shift, 0) + 127) << 23).view(torch.float32)  # 2**shift, bit by bit
        return scale.view(1).view(torch.uint8), torch.mul(values, scale).half().view(torch.uint8)

    def from_bytes(self, payload: memoryview, raw: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        (scale,) = self._scale.unpack_from(payload)
        scratch.copy_(raw[self._scale.size :].view(torch.float16))
        return scratch.mul_(1.0 / scale) if scale != 1.0 else scratch


class Bf16:
    """bfloat16: fp32's range with 8 bits of precision, 2 bytes per value."""

    name = "bf16"
    biased = coarse = sparse = False

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        return self.encode_parts((values,))

    def encode_parts(self, parts: Sequence[torch.Tensor]) -> tuple[Buffer, ...]:
        return tuple([bytes_of(part.bfloat16().view(torch.int16)) for part in parts])

    def check(self, payload: memoryview, numel: int) -> None:
        check_size(self.name, payload, 2 * numel)

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        return scratch.copy_(torch.frombuffer(payload, dtype=torch.bfloat16))

    def to_bytes(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (values.bfloat16().view(torch.uint8),)

    def from_bytes(self, payload: memoryview, raw: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        return scratch.copy_(raw.view(torch.bfloat16))


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return values.numpy().data.cast("B")


def check_size(name: str, payload: memoryview, expected: int) -> None:
    """Refuse a payload of another length than ``expected`` bytes.

    Raises:
        CorruptFrame: the length differs; says both.
    """
    if len(payload) != expected:
        raise CorruptFrame(f"{name} payload has {len(payload)} bytes; this bucket needs {expected}")
