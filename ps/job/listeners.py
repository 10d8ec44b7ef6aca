"""What a job tells the objects around it: one listener class, whose methods do nothing until a subclass overrides them.

Job --on_engine_built, on_cut_missed, on_parameters_ready, on_stop--> every listener, in the order of registration
    --on_roster_decided, on_norm_decided--> listener, which calls the continuation, now or later --> next listener
"""

import functools
from collections.abc import Callable

from torch_ps.common.errors import PsError
from torch_ps.ps.core.effects import UpdateKey
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.engine.engine import Engine


class JobListener:
    """Hears of one job; does nothing by itself. All methods are called on the event loop and must not block."""

    def on_engine_built(self, engine: Engine) -> None:
        """A model is known and ``engine``, still without parameters, replaces the one before."""

    def on_parameters_ready(self) -> None:
        """A worker has sent the last of the first parameters."""

    def on_roster_decided(self, roster: Roster, take_effect: Callable[[], None]) -> None:
        """The lead has decided ``roster``. The listener calls ``take_effect`` when others may know of it."""
        take_effect()

    def on_norm_decided(self, group: UpdateKey, square: float | None, answer: Callable[[], None]) -> None:
        """The squared norm of one update is decided; None drops the update. ``answer`` tells it to the shards."""
        answer()

    def on_cut_missed(self, version: int) -> None:
        """The checkpoint of ``version`` was announced, and this shard can no longer copy its state at it."""

    def on_stop(self, error: PsError) -> None:
        """The server stops; ``error`` is what peers are told."""


class JobListeners(JobListener):
    """Passes every call on to the listeners that were added, in that order."""

    def __init__(self) -> None:
        self._listeners: list[JobListener] = []

    def add(self, listener: JobListener) -> None:
        self._listeners.append(listener)

    def on_engine_built(self, engine: Engine) -> None:
        for each in self._listeners:
            each.on_engine_built(engine)

    def on_parameters_ready(self) -> None:
        for each in self._listeners:
            each.on_parameters_ready()

    def on_roster_decided(self, roster: Roster, take_effect: Callable[[], None]) -> None:
        for each in reversed(self._listeners):
            take_effect = functools.partial(each.on_roster_decided, roster, take_effect)
        take_effect()

    def on_norm_decided(self, group: UpdateKey, square: float | None, answer: Callable[[], None]) -> None:
        for each in reversed(self._listeners):
            answer = functools.partial(each.on_norm_decided, group, square, answer)
        answer()

    def on_cut_missed(self, version: int) -> None:
        for each in self._listeners:
            each.on_cut_missed(version)

    def on_stop(self, error: PsError) -> None:
        for each in self._listeners:
            each.on_stop(error)
