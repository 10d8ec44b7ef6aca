"""Every interleaving of a few deterministic machines.

Rules of this file
  1. A machine is an object whose attributes are immutable values. What it does with an event is computed once for each
     state that it is found in, and remembered; so a state of the world is a handful of small numbers.
  2. The network is the set of all messages ever sent. A message may be delivered now, later, again or never: loss,
     delay, repeats, any order and partitions are all in it.
Source: explicit-state model checking as in SPIN and TLC; the network is that of Lamport's specifications.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

V = TypeVar("V")
Out = TypeVar("Out")


def frozen(value: Any) -> Hashable:
    """A machine's attribute as something that can be hashed."""
    if isinstance(value, dict):
        return frozenset(value.items())
    if hasattr(value, "__dict__") and not isinstance(value, type) and not hasattr(value, "_value_"):
        return tuple((name, frozen(each)) for name, each in vars(value).items())
    return value  # type: ignore[no-any-return]


def copied(machine: V) -> V:
    """A machine that can be changed without changing this one; its machines are copied with it."""
    new = object.__new__(type(machine))
    for name, value in vars(machine).items():
        vars(new)[name] = copied(value) if hasattr(value, "__dict__") and not hasattr(value, "_value_") else value
    return new


class Numbered(Generic[V]):
    """Values by number, each value once."""

    def __init__(self) -> None:
        self.values: list[V] = []
        self._numbers: dict[Hashable, int] = {}

    def number(self, value: V, key: Hashable = None) -> int:
        """The number of a value that is ``value``, or has this key."""
        key = value if key is None else key
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.values)
            self.values.append(value)
        return found


class Machines(Generic[V, Out]):
    """States of machines by number, and what they do, computed once.

    Args:
        step: changes a machine by an event, and returns what came out.
    """

    def __init__(self, step: Callable[[V, Any], Out]) -> None:
        self._step = step
        self._states = Numbered[V]()
        self._done: dict[tuple[int, int], tuple[int, Out]] = {}

    def __len__(self) -> int:
        return len(self._states.values)

    def number(self, machine: V) -> int:
        return self._states.number(machine, (type(machine), frozen(machine)))

    def __getitem__(self, number: int) -> V:
        return self._states.values[number]

    def step(self, number: int, name: int, event: Any) -> tuple[int, Out]:
        """The state after an event, which has the number ``name``, and what came out."""
        found = self._done.get((number, name))
        if found is None:
            machine = copied(self[number])
            out = self._step(machine, event)
            found = self._done[number, name] = self.number(machine), out
        return found


@dataclass(slots=True)
class Found:
    """Result of an exploration.

    Attributes:
        violation: description of the violated property; "" if none.
        way: events from the start to the violation.
        complete: whether nothing was left to explore.
    """

    states: int = 0
    transitions: int = 0
    seconds: float = 0.0
    violation: str = ""
    way: list[str] = field(default_factory=list)
    complete: bool = False

    def __str__(self) -> str:
        rate = f"{self.states} states, {self.transitions} transitions, {self.seconds:.1f} s"
        return "\n".join([rate, *([self.violation, *self.way] if self.violation else [])])


C = TypeVar("C", bound=Hashable)
#: The state of everything but the network, and the messages ever sent, as bits.
World = tuple[C, int]


def explore(
    start: World[C],
    nexts: Callable[[C, int], Iterable[tuple[Any, C, int, str]]],
    *,
    check: Callable[[C], str],
    max_states: int,
) -> Found:
    """Visit every state that can be reached; stop at the first violation.

    Whatever may happen may also happen where more messages have been sent. So of states that differ in that alone,
    those with fewer messages need not be visited.

    Args:
        nexts: function from a state to its transitions: event, next state, and violation ("" for none).
        check: function from a state to its violation ("" for none); called once per state.
        max_states: states to visit at most.
    """
    began = time.perf_counter()
    before: dict[World[C], tuple[World[C], Any]] = {}
    most: dict[C, list[int]] = {start[0]: [start[1]]}  # sets of messages of which none contains another
    waiting = [start]
    found = Found()
    while waiting and not found.violation and found.states < max_states:
        here = waiting.pop()
        control, net = here
        if net not in most[control]:
            continue  # one with more messages has come up meanwhile
        found.states += 1
        for event, after, sent, wrong in nexts(control, net):
            found.transitions += 1
            seen = most.get(after)
            if seen is None:
                wrong = wrong or check(after)
                most[after] = [sent]
            elif wrong:
                pass
            elif any(sent | each == each for each in seen):
                continue
            else:
                most[after] = [each for each in seen if each | sent != sent] + [sent]
            if (after, sent) != start:
                before.setdefault((after, sent), (here, event))
            if wrong:
                found.violation, found.way = wrong, [*_way(before, here), str(event)]
                break
            waiting.append((after, sent))
    found.complete = not waiting and not found.violation
    found.seconds = time.perf_counter() - began
    return found


def _way(before: dict[World[C], tuple[World[C], Any]], state: World[C]) -> list[str]:
    events = []
    while state in before:
        state, event = before[state]
        events.append(str(event))
    return events[::-1]


def bits(mask: int) -> Iterator[int]:
    """Positions of the ones of a number."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
