"""Planted bugs of the boundary and of what lies behind it: each was one, or would be if one check were left out.

Each function takes one check away for as long as its ``MonkeyPatch`` lasts; ``hostile.search`` has to find it.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from torch_ps.common import optimizer_spec
from torch_ps.common.errors import Overloaded
from torch_ps.common.typed_numbers import TypedNumber
from torch_ps.common.wire import field_ranges, socket_frames
from torch_ps.common.wire.field_ranges import ANY, Real
from torch_ps.ps.cluster.registration import Registrar
from torch_ps.ps.core.effects import Effects, UpdateKey
from torch_ps.ps.core.failover import seat
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.shard import Shard, _needs, _Parked
from torch_ps.ps.engine.grad_clip import NormCollector
from torch_ps.ps.engine.norm_meter import NormMeter
from torch_ps.ps.transport.socket_carrier import SocketCarrier

Patch = pytest.MonkeyPatch


def flags_are_numbers(patch: Patch) -> None:
    """A push with ``weight_decay=True`` is taken, and torch fails in the step."""

    def is_number(value: object) -> bool:
        return isinstance(value, int | float | TypedNumber) and abs(value) <= optimizer_spec.LARGEST

    patch.setattr(optimizer_spec, "_is_number", is_number)
    patch.setattr(optimizer_spec, "_try_steps", lambda name, job, hyper: None)


def parked_twice(patch: Patch) -> None:
    """A push that is parked is taken when it comes again with an older roster epoch, and parked all the same."""
    push_of = Shard.push

    def push(self: Shard, push: Push, now: float = 0.0) -> Effects:
        key = (push.worker, push.session, push.bucket, True)
        parked: _Parked | None = self._parked.pop(key, None) if _needs(push) <= self.roster.epoch else None
        try:
            return push_of(self, push, now)
        finally:
            if parked is not None:
                self._parked[key] = parked

    patch.setattr(Shard, "push", push)


def anybody_reports_norms(patch: Patch) -> None:
    """Whoever calls Norm, of whatever step, fills the table of updates that wait, here a small one."""
    report_of = NormCollector.report

    async def report(self: NormCollector, group: UpdateKey, shard: int, square: float) -> float | None:
        if group not in self._reported and len(self._reported) >= 4:
            raise Overloaded("4 updates wait for their norm already")
        return await report_of(self, group, shard, square)

    patch.setattr(Registrar, "check", lambda self, shard, secret: None)
    patch.setattr(NormCollector, "_check", lambda self, group: None)
    patch.setattr(NormCollector, "report", report)


def weights_have_no_bound(patch: Patch) -> None:
    """Two pushes of weight 1e308 make the sum of the weights infinite, which no checkpoint and no standby takes."""
    patch.setitem(field_ranges.RANGES, "Push", field_ranges.RANGES["Push"] | {"weight": Real(0.0, 1e308)})


def question_loses_its_gradients(patch: Patch) -> None:
    """A worker that begins to ask for another norm takes away the gradients of the question that others wait for."""
    take = NormMeter.take

    def taken(self: NormMeter, stream: Any, bucket: Any, measure: Any, gradient: Any) -> None:
        self._coming = self._asked
        try:
            take(self, stream, bucket, measure, gradient)
        finally:
            self._coming = {}

    patch.setattr(NormMeter, "take", taken)


def terms_have_no_bound(patch: Patch) -> None:
    """A worker says to have promised the largest term that fits; the server's next one does not fit."""
    patch.setitem(field_ranges.RANGES, "Term", {"number": ANY, "server": ANY})
    patch.setattr(seat, "MAX_JUMP", 1 << 64)


def lengths_have_no_bound(patch: Patch) -> None:
    """A message over a socket is received however long it says to be."""

    def lengths_of(prefix: bytes | memoryview) -> tuple[int, int, bool]:
        head, payload = socket_frames.PREFIX.unpack(prefix)
        return head & 0x7FFFFFFF, payload, bool(head >> 31)

    patch.setattr(socket_frames, "lengths_of", lengths_of)


def errors_of_messages_end_no_stream(patch: Patch) -> None:
    """What a message over a socket raises goes to the event loop, and the stream goes on."""

    def deliver(self: SocketCarrier) -> None:
        while self._stream is not None and not self._ended.done() and (found := self._receiver.next()) is not None:
            self._on_message(found[0])

    patch.setattr(SocketCarrier, "_deliver", deliver)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    each.__name__: each
    for each in (
        flags_are_numbers,
        parked_twice,
        anybody_reports_norms,
        weights_have_no_bound,
        question_loses_its_gradients,
        terms_have_no_bound,
        lengths_have_no_bound,
        errors_of_messages_end_no_stream,
    )
}


def found(name: str, seconds: float, seed: int = 1) -> str:
    """What the search says of one mutant; "" if it finds nothing in so many seconds."""
    from tests.fuzz.hostile import search

    with pytest.MonkeyPatch.context() as patch:
        MUTANTS[name](patch)
        field_ranges._check_of.cache_clear()
        try:
            search(seconds, seed)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is found
            return f"{type(error).__name__}: {error}"
        finally:
            field_ranges._check_of.cache_clear()
    return ""


if __name__ == "__main__":
    said = found(sys.argv[1], float(sys.argv[2]))
    sys.stdout.write(f"found: {said}\n" if said else "nothing found\n")
    sys.exit(not said)
