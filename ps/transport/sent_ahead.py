"""Gradients that a worker has sent while its backward ran: held for its stream until a push names them.

    gradient 7 --arrive()--> held --push that names 7: claim()--> both go to the core
    push that names 7 --claim()--> waits --gradient 7: arrive()--> both go to the core

Rules of this file
  1. For each bucket a stream holds one gradient, or one push that waits for its gradient, and never both.
  2. Numbers grow. A newer gradient takes the place of an older one; an older one that comes late is dropped.
  3. A push that comes again after its gradient was taken goes to the core without one: the core has it, and answers.
  4. A copy of a push may come before the push itself, over another connection. The first of the two counts; the other
     changes nothing and is not answered.
  5. All of it ends with the stream. On its next stream the worker sends again what is not answered.

Cost: O(1) per message.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch_ps.common.codecs import Codec, codec
from torch_ps.common.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Encoded:
    """Values of one bucket: a checked payload and its codec."""

    codec: Codec
    payload: memoryview


#: Called with the gradient of a push; its payload is empty if the push is a repeat whose gradient was taken before.
Taker = Callable[[Encoded], None]


@dataclass(slots=True)
class _Place:
    """One bucket.

    Attributes:
        number: Number of the newest gradient that has come or is waited for.
        held: That gradient, while no push has named it.
        taker: Takes it as soon as it comes; None: no push waits.
        step: Step of the push that has taken it.
        copied: Whether that was a copy, and the push itself has not come.
    """

    number: int
    held: Encoded | None = None
    taker: Taker | None = None
    step: int = -1
    copied: bool = False


class SentAhead:
    """The gradients of one stream that no push has named yet, and the pushes whose gradient has not come."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}

    def arrive(self, bucket: int, number: int, gradient: Encoded) -> None:
        """Hold a gradient, or hand it to the push that waits for it.

        Raises:
            ProtocolError: A push waits for an older gradient, which has not come.
        """
        place = self._places.get(bucket)
        if place is not None and number < place.number:
            return
        if place is None or (number > place.number and place.taker is None):
            self._places[bucket] = _Place(number, held=gradient)
        elif number > place.number:
            raise ProtocolError(
                f"a push of bucket {bucket} waits for gradient {place.number}, and gradient {number} has come instead"
            )
        elif place.taker is not None:
            taker, place.taker = place.taker, None
            taker(gradient)
        elif place.held is not None:
            place.held = gradient

    def claim(self, bucket: int, number: int, step: int, taker: Taker) -> None:
        """Have ``taker`` called with a gradient of one bucket, now or when it comes.

        Args:
            bucket: Index of the bucket.
            number: Number of the gradient.
            step: Step of the push that names it.
            taker: Called once; a later claim of the same gradient takes its place while it waits.

        Raises:
            ProtocolError: A newer gradient has taken its place, or the push of another step has taken it.
        """
        place = self._places.get(bucket)
        if place is not None and place.copied and (place.number, place.step) == (number, step):
            place.copied = False
            return
        if place is None or number > place.number:
            self._places[bucket] = _Place(number, taker=taker, step=step)
            return
        if number < place.number:
            raise ProtocolError(
                f"a push of bucket {bucket} names gradient {number}, in whose place gradient {place.number} has come"
            )
        if place.held is not None:
            gradient, place.held, place.step = place.held, None, step
            taker(gradient)
        elif place.taker is not None:
            place.taker, place.step = taker, step
        elif place.step == step:
            taker(Encoded(codec("none"), memoryview(b"")))
        else:
            raise ProtocolError(
                f"a push of bucket {bucket} at step {step} names gradient {number}, which step {place.step} has taken"
            )

    def claim_by_copy(self, bucket: int, number: int, step: int, taker: Taker) -> None:
        """As ``claim``, for a copy of a push: nothing happens if the push has come, or anything newer."""
        place = self._places.get(bucket)
        if place is None or number > place.number:
            self._places[bucket] = _Place(number, taker=taker, step=step, copied=True)
        elif number == place.number and place.held is not None:
            gradient, place.held, place.step, place.copied = place.held, None, step, True
            try:
                taker(gradient)
            except BaseException:  # the push itself comes to the same end, and its worker hears of it
                place.held, place.copied = gradient, False
                raise

    def look(self, bucket: int, number: int) -> Encoded:
        """A gradient that is held, and stays so.

        Raises:
            ProtocolError: It is not held.
        """
        place = self._places.get(bucket)
        if place is None or place.number != number or place.held is None:
            raise ProtocolError(f"gradient {number} of bucket {bucket} has not been sent ahead")
        return place.held

    def clear(self) -> None:
        """Drop everything."""
        self._places.clear()
