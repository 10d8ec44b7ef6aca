"""What one apply thread of a server on a GPU needs to move buckets: a side of its own, and pinned memory.

    payload --copy--> pinned --copy--> raw, on the GPU --from_bytes--> values           two in turn
    values --to_bytes--> parts, on the GPU --copy--> pinned --mark--> payload

Rules of this file
  1. Of one thread, which enters ``side`` first. A run ends when its side is done (``Store.beside``), so that the next
     run of a bucket finds its tensors whole on whichever thread it is.
  2. A codec that no device runs works on the CPU, on fp32 values in pinned memory.
"""

import itertools

import torch

from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.on_gpu import on_device
from torch_ps.common.codecs.plain import bytes_of
from torch_ps.common.devices import PinnedBuffer, SideStream
from torch_ps.common.wire.frames import Buffer


class Staging:
    """Of one apply thread.

    Memory: two buckets on the device and three of pinned memory.

    Args:
        numel: of the largest bucket.
        device: of the tensors; the CPU will do, then with copies that nobody needs.
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
        """The values of a checked payload, shape of ``scratch``, on the device; to be read until the next but one call.

        Args:
            scratch: shape (numel,), fp32, on the device; what is returned may be another tensor.
        """
        pinned, raw = next(self._in)
        pinned.event.wait()  # the copy of two calls ago
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
        """The payload of ``values``, shape (numel,), fp32, there; good until the next call of it or of ``host``."""
        by_device = on_device(codec)
        if by_device is None:
            return codec.encode(self.host(values))
        size = self._out.take(by_device.to_bytes(values))
        self._out.event.wait()
        return (bytes_of(self._out.bytes[:size]),)

    def host(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of ``values`` on the CPU; good until the next call of it or of ``encode``."""
        self._out.take((values.view(torch.uint8),))
        self._out.event.wait()
        return self._out.values[: values.numel()]
