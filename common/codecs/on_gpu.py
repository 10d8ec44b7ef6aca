"""Codecs that run on a GPU: half the bytes cross its bus, and the CPU computes nothing.

    GPU:     values --to_bytes()--> tensors of bytes --copy--> payload        (the bytes that ``encode`` would give)
             payload --copy--> raw --from_bytes()--> values                   (the values that ``decode`` would give)

Rules of this file
  1. What to send is decided on the device: reading one number back would wait for all work queued there.
  2. A codec that has these methods has them for the CPU too. Only the bits of a NaN may differ between devices.

The codecs of ``plain`` have them; the others encode on the CPU, from fp32 values that have been copied there.
"""

from typing import Protocol, runtime_checkable

import torch

from torch_ps.common.codecs.registry import Codec


@runtime_checkable
class DeviceCodec(Codec, Protocol):
    """A codec that encodes and decodes on the device of the values, without waiting for the device."""

    def to_bytes(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The payload of ``values``, shape (n,), fp32, as uint8 parts on their device; parts may be views.

        All parts together have at most ``4 n + HEAD`` bytes (``torch_ps.common.devices``).
        """

    def from_bytes(self, payload: memoryview, raw: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a checked payload, shape (n,), fp32, on the device of ``raw``.

        Args:
            payload: the bytes in host memory.
            raw: the same bytes on the device, uint8.
            scratch: buffer on the device, shape (n,), fp32; returned if the values cannot be a view of ``raw``.
        """


def on_device(codec: Codec) -> DeviceCodec | None:
    """``codec`` if it can run on a GPU, else None."""
    return codec if isinstance(codec, DeviceCodec) else None
