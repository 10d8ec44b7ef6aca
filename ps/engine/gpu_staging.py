"""GPU stream and pinned memory of one apply thread, for moving buckets to and from the device.

    payload --copy--> pinned --copy--> raw, on the GPU --from_bytes--> values           two in turn
    values --to_bytes--> parts, on the GPU --copy--> pinned --event--> payload

Rules of this file
  1. One thread uses an object, inside ``side``. A run ends when its stream is done (``Store.beside``), so the next run
     of a bucket finds complete tensors on any thread.
  2. A codec without a device implementation runs on the CPU, on fp32 values in pinned memory.
"""

import itertools

import torch

from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.on_gpu import on_device
from torch_ps.common.codecs.plain import bytes_of
from torch_ps.common.devices import PinnedBuffer, SideStream
from torch_ps.common.wire.frames import Buffer


class Staging:
    """Staging buffers of one apply thread.

    Memory: two buckets on the device and three of pinned memory.

    Args:
        device: Device of the tensors; with the CPU (in tests) the copies are made all the same.
        numel: Number of values of the largest bucket.
    """

    def __init__(self, device: torch.device, numel: int) -> None:
        self.side = SideStream(device)
        pairs = []
        with self.side.running():
            for _ in range(2):
                pinned = PinnedBuffer(self.side, numel)
                pairs.append((pinned, torch.empty(len(pinned.bytes), dtype=torch.uint8, device=device)))
        self._in = itertools.cycle(pairs)
        self._out = PinnedBuffer(self.side, numel)

    def decode(self, codec: Codec, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a checked payload on the device, valid until the next but one call.

        Args:
            codec: Codec of the payload.
            payload: Encoded values.
            scratch: Tensor for the values, fp32 of shape (numel,) on the device; the result may be another tensor.
        """
        pinned, raw = next(self._in)
        pinned.event.wait()  # for the copy of two calls ago
        by_device, size = on_device(codec), len(payload)
        if by_device is not None:
            pinned.bytes[:size].copy_(torch.frombuffer(payload, dtype=torch.uint8))
            raw[:size].copy_(pinned.bytes[:size], non_blocking=True)
            pinned.event.set()
            return by_device.from_bytes(payload, raw[:size], scratch)
        host = pinned.values[: scratch.numel()]
        decoded = codec.decode(payload, host)
        if decoded.data_ptr() != host.data_ptr():
            host.copy_(decoded)
        scratch.copy_(host, non_blocking=True)
        pinned.event.set()
        return scratch

    def encode(self, codec: Codec, values: torch.Tensor) -> tuple[Buffer, ...]:
        """Encode ``values``, fp32 of shape (numel,) on the device; valid until the next ``encode`` or ``host``."""
        by_device = on_device(codec)
        if by_device is None:
            return codec.encode(self.host(values))
        size = self._out.take(by_device.to_bytes(values))
        self._out.event.wait()
        return (bytes_of(self._out.bytes[:size]),)

    def host(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of ``values`` on the CPU, valid until the next ``host`` or ``encode``."""
        self._out.take((values.view(torch.uint8),))
        self._out.event.wait()
        return self._out.values[: values.numel()]
