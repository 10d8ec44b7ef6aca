"""Devices: which one an option means, and work that runs beside what computes there.

    compute   ..backward....|follow..................................join|...forward
    side                    +--pack--encode--copy to pinned memory--mark-+
    host                                                            mark.wait() --> the bytes are there

Rules of this file
  1. Nothing here waits for a whole device: only for a mark, or for one side.
  2. On the CPU all is done when it is called, so the same code runs there, and no test of it needs a GPU.
  3. For the CPU nothing is asked of CUDA, which would load it.

Source: the CUDA programming guide on streams and events; https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

import contextlib
from collections.abc import Iterable

import torch

from torch_ps.common.errors import ConfigError

#: Bytes that a payload may have beside 4 for each value, as for a scale.
HEAD = 64


def choose(wanted: str, local_rank: int = 0) -> torch.device:
    """The device that ``--device`` means.

    Args:
        wanted: auto, cpu, cuda or cuda:N. "auto" is the GPU of the local rank where there are GPUs, else the CPU.
        local_rank: place of this process on its host. With more processes than GPUs they share them in turn.

    Raises:
        ConfigError: a GPU that is not there; says which are.
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
    """Work for ``device`` beside its other work: a CUDA stream. Use it from one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def running(self) -> contextlib.AbstractContextManager[object]:
        """What this thread gives the device inside goes to this side."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def current(self) -> torch.cuda.Stream | None:
        """Where the calling thread's work goes now; None on the CPU."""
        return None if self._stream is None else torch.cuda.current_stream(self.device)

    def follow(self, streams: Iterable[torch.cuda.Stream | None]) -> None:
        """What comes on this side begins after all that these have been given so far. The host does not wait."""
        if self._stream is not None:
            for stream in streams:
                if stream is not None:
                    self._stream.wait_stream(stream)

    def join(self) -> None:
        """What the calling thread computes next begins after all that this side has been given. No wait of the host."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def synchronize(self) -> None:
        """Wait until all that this side has been given is done."""
        if self._stream is not None:
            self._stream.synchronize()


class StreamEvent:
    """A point in the work of a side; set again and again, the last one counts."""

    def __init__(self, side: SideStream) -> None:
        # Without ``blocking`` the host would look again and again, which costs a core.
        gpu = side.device.type == "cuda"
        self._event = torch.cuda.Event(blocking=True) if gpu else None  # type: ignore[no-untyped-call]

    def set(self) -> None:
        """Here, in the work of the side that is ``running``."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the work before the mark is done; at once if it was never set. Other threads go on."""
        if self._event is not None:
            self._event.synchronize()


class PinnedBuffer:
    """Memory of the host, for one bucket, that a device copies to and from by itself.

    Attributes:
        bytes: shape (4 * numel + HEAD,), uint8. ``values`` is the same memory as fp32, shape (numel,).
        mark: set behind the last copy from or to it; to be waited for before the memory is read, or used again.
    """

    def __init__(self, side: SideStream, numel: int) -> None:
        self.bytes = torch.empty(4 * numel + HEAD, dtype=torch.uint8, pin_memory=side.device.type == "cuda")
        self.values = self.bytes[: 4 * numel].view(torch.float32)
        self.event = StreamEvent(side)

    def take(self, parts: Iterable[torch.Tensor]) -> int:
        """Begin to copy tensors of bytes here, one after the other, and set the mark; gives how many bytes."""
        at = 0
        for part in parts:
            self.bytes[at : at + len(part)].copy_(part, non_blocking=True)
            at += len(part)
        self.event.set()
        return at


def keep_for_stream(tensor: torch.Tensor) -> torch.Tensor:
    """Keep the memory of ``tensor`` until this thread's work of now is done, also if it is dropped sooner; returns it.

    For a tensor that was made on another side than the one that uses it.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
