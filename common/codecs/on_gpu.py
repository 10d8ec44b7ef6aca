"""Codecs that a GPU can run by itself: half the bytes cross its bus, and the CPU has nothing to compute.

    device:  values --to_bytes()--> tensors of bytes --copy--> payload        (the bytes that ``encode`` would give)
             payload --copy--> raw --from_bytes()--> values                   (the values that ``decode`` would give)

Rules of this file
  1. What to send is decided on the device: to read one number back would wait for all that is queued there.
  2. A codec that has these methods has them for the CPU too. Only which NaN a NaN becomes may differ between devices.

``plain`` has them; the others are encoded on the CPU, from fp32 values that have been copied there.
"""

from typing import Protocol, runtime_checkable

import torch

from torch_ps.common.codecs.registry import Codec


@runtime_checkable
class DeviceCodec(Codec, Protocol):
    """A codec whose two directions run where the values are, without a wait for the device."""

    def to_bytes(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The payload of ``values``, shape (n,), fp32, as parts, uint8, on their device; views of it may be among them.

        All parts together have at most ``4 n + HEAD`` bytes (``torch_ps.common.devices``).
        """

    def from_bytes(self, payload: memoryview, raw: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a checked payload, shape (n,), fp32, on the device of ``raw``.

        Args:
            payload: on the host.
            raw: the same bytes on the device, uint8.
            scratch: shape (n,), fp32, there; returned if the values cannot be a view of ``raw``.
        """


def on_device(codec: Codec) -> DeviceCodec | None:
    """``codec`` where a device can run it; None: it runs on the CPU."""
    return codec if isinstance(codec, DeviceCodec) else None
