"""In the place of CUDA's streams, ones that keep account of what is certain to come before what.

    work       one more piece of work on a stream: after all that the stream knows of, and after all that is done
    record, wait_stream, synchronize       pass on what is known, as CUDA's do

The tensors are on the CPU, where all is done at once; so a wait that is missing changes no bit here, but the account
shows it.

Source: Lamport, "Time, Clocks, and the Ordering of Events in a Distributed System", 1978.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

#: Work: the stream that it is on, and its number there.
Work = tuple["Stream", int]


class Device:
    """Says that it is a GPU."""

    type = "cuda"


class Stream:
    """Works after what it knows of: for each stream the number of its last piece of work that comes before."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.known: dict[Stream, int] = {self: 0}

    def work(self) -> Work:
        self.learn(self._world.done)
        self.known[self] += 1
        return self, self.known[self]

    def learn(self, known: "dict[Stream, int]") -> None:
        _merge(self.known, known)

    def knows(self, work: Work) -> bool:
        return self.known.get(work[0], 0) >= work[1]

    def wait_stream(self, other: "Stream") -> None:
        self.learn(other.known)

    def synchronize(self) -> None:
        _merge(self._world.done, self.known)


class Event:
    def __init__(self, world: "World") -> None:
        self._world = world
        self._known: dict[Stream, int] = {}

    def record(self) -> None:
        self._known = dict(self._world.current().known)

    def synchronize(self) -> None:
        _merge(self._world.done, self._known)


class World:
    """One GPU. ``compute`` is the stream of all threads that have not entered another one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: dict[Stream, int] = {}
        self.compute = Stream(self)
        self._local = threading.local()
        empty = torch.empty

        def on_cpu(*size: Any, device: Any = None, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            return empty(*size, device=None if isinstance(device, Device) else device, **more)

        monkeypatch.setattr(torch, "empty", on_cpu)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current())
        monkeypatch.setattr(torch.cuda, "stream", self._entered)

    def current(self) -> Stream:
        found: Stream = getattr(self._local, "stream", self.compute)
        return found

    def is_done(self, work: Work) -> bool:
        return self.done.get(work[0], 0) >= work[1]

    @contextlib.contextmanager
    def _entered(self, stream: Stream) -> Iterator[None]:
        before = self.current()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before


def _merge(known: dict[Stream, int], more: dict[Stream, int]) -> None:
    for stream, number in tuple(more.items()):
        known[stream] = max(known.get(stream, 0), number)
