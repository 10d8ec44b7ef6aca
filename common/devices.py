"""Devices: the one that ``--device`` means, and CUDA streams beside the one that computes.

    compute   ..backward....|follow..................................join|...forward
    side                    +--pack--encode--copy to pinned memory-event-+
    host                                                            event.wait() --> the bytes are there

Rules of this file
  1. Nothing here waits for a whole device, only for an event or for one stream.
  2. On the CPU every call has finished when it returns, so the same code runs there and its tests need no GPU.
  3. For the CPU nothing calls CUDA, which would load it.

Source: CUDA programming guide, streams and events; https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

import contextlib
from collections.abc import Iterable

import torch

from torch_ps.common.errors import ConfigError

#: Bytes of a payload beyond 4 per value, such as a scale.
HEAD = 64


def choose(wanted: str, local_rank: int = 0) -> torch.device:
    """The device that ``--device`` means.

    Args:
        wanted: auto, cpu, cuda or cuda:N. "auto" is the GPU of the local rank where there are GPUs, else the CPU.
        local_rank: rank of this process among those of its host; processes share GPUs in turn if there are fewer.

    Raises:
        ConfigError: the GPU does not exist; names those that do.
    """
    kind, _, number = wanted.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto" and not count:
        return torch.device("cpu")
    if not count:
        raise ConfigError(f"device {wanted}: torch {torch.__version__} finds no GPU here; use --device cpu")
    index = int(number) if number else local_rank % count
    if index >= count:
        here = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"device {wanted}: this host has {count} GPU{'s' * (count > 1)}, {here}")
    return torch.device("cuda", index)


class SideStream:
    """A CUDA stream beside the one that computes; no stream on the CPU. Use it from one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the calling thread enqueues work on this stream."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def current(self) -> torch.cuda.Stream | None:
        """The stream on which the calling thread enqueues work now; None on the CPU."""
        return None if self._stream is None else torch.cuda.current_stream(self.device)

    def follow(self, streams: Iterable[torch.cuda.Stream | None]) -> None:
        """Make later work of this stream wait for all work enqueued on ``streams`` so far. The host does not wait."""
        if self._stream is not None:
            for stream in streams:
                if stream is not None:
                    self._stream.wait_stream(stream)

    def join(self) -> None:
        """Make later work of the calling thread wait for all work enqueued on this stream. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def synchronize(self) -> None:
        """Block until all work enqueued on this stream is done."""
        if self._stream is not None:
            self._stream.synchronize()


class StreamEvent:
    """A point in the work of a stream; a later ``set`` replaces it."""

    def __init__(self, side: SideStream) -> None:
        # Without ``blocking`` the host would poll, which costs a core.
        gpu = side.device.type == "cuda"
        self._event = torch.cuda.Event(blocking=True) if gpu else None  # type: ignore[no-untyped-call]

    def set(self) -> None:
        """Record the event in the work of the stream that is ``running``."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Block until the work before the event is done; return at once if it was never set. Other threads go on."""
        if self._event is not None:
            self._event.synchronize()


class PinnedBuffer:
    """Pinned host memory for one bucket: a device copies to and from it asynchronously.

    Attributes:
        bytes: shape (4 * numel + HEAD,), uint8.
        values: the first 4 * numel of these bytes as fp32, shape (numel,).
        event: end of the last copy from or to this memory; wait for it before reading or reusing the memory.
    """

    def __init__(self, side: SideStream, numel: int) -> None:
        self.bytes = torch.empty(4 * numel + HEAD, dtype=torch.uint8, pin_memory=side.device.type == "cuda")
        self.values = self.bytes[: 4 * numel].view(torch.float32)
        self.event = StreamEvent(side)

    def take(self, parts: Iterable[torch.Tensor]) -> int:
        """Begin to copy byte tensors here, one after the other, and set the event. Returns the number of bytes."""
        at = 0
        for part in parts:
            self.bytes[at : at + len(part)].copy_(part, non_blocking=True)
            at += len(part)
        self.event.set()
        return at


def keep_for_stream(tensor: torch.Tensor) -> torch.Tensor:
    """Keep the memory of ``tensor`` until the work enqueued so far is done, even if the tensor is dropped before.

    Needed where a tensor was made on another stream than the one that uses it. Returns the tensor.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
