"""Gradients that are sent ahead meet their push, whichever comes first; each counts once, and an older one never."""

import pytest

from torch_ps.common.codecs import codec
from torch_ps.common.errors import ProtocolError
from torch_ps.ps.transport.sent_ahead import Encoded, SentAhead


class Taken(list[bytes]):
    """Payloads that pushes have taken, in this order."""

    def __call__(self, gradient: Encoded) -> None:
        self.append(bytes(gradient.payload))


def gradient(values: bytes) -> Encoded:
    return Encoded(codec("none"), memoryview(values))


def test_gradient_is_held_until_a_push_names_it() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.arrive(0, 1, gradient(b"one"))
    assert taken == []
    ahead.claim(0, 1, 0, taken)
    assert taken == [b"one"]


def test_push_that_overtakes_its_gradient_waits_for_it() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.claim(0, 1, 0, taken)
    assert taken == []
    ahead.arrive(0, 1, gradient(b"one"))
    assert taken == [b"one"]


def test_newer_gradient_of_a_bucket_takes_the_place_of_an_older_one() -> None:
    ahead, taken = SentAhead(), Taken()
    for number, values in ((1, b"one"), (3, b"three"), (2, b"two, late")):
        ahead.arrive(0, number, gradient(values))
    ahead.claim(0, 3, 0, taken)
    assert taken == [b"three"]


def test_older_gradient_than_a_push_waits_for_is_dropped() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.arrive(0, 1, gradient(b"one"))
    ahead.claim(0, 3, 0, taken)
    ahead.arrive(0, 2, gradient(b"two"))
    assert taken == []
    ahead.arrive(0, 3, gradient(b"three"))
    assert taken == [b"three"]


def test_buckets_do_not_mix() -> None:
    ahead, first, second = SentAhead(), Taken(), Taken()
    ahead.arrive(0, 1, gradient(b"one"))
    ahead.claim(1, 1, 0, second)
    ahead.claim(0, 1, 0, first)
    assert (first, second) == ([b"one"], [])


def test_push_that_comes_again_is_handed_on_without_a_gradient() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.arrive(0, 1, gradient(b"one"))
    for _ in range(2):
        ahead.claim(0, 1, 0, taken)
    ahead.arrive(0, 1, gradient(b"one, again"))
    ahead.claim(0, 1, 0, taken)
    assert taken == [b"one", b"", b""]


def test_push_that_comes_again_while_it_waits_is_handed_on_once() -> None:
    ahead, before, taken = SentAhead(), Taken(), Taken()
    ahead.claim(0, 1, 0, before)
    ahead.claim(0, 1, 0, taken)
    for _ in range(2):
        ahead.arrive(0, 1, gradient(b"one"))
    assert (before, taken) == ([], [b"one"])


def test_gradient_cannot_serve_two_steps() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.arrive(0, 1, gradient(b"one"))
    ahead.claim(0, 1, 0, taken)
    with pytest.raises(ProtocolError, match="at step 1 names gradient 1, which step 0 has taken"):
        ahead.claim(0, 1, 1, taken)
    assert taken == [b"one"]


def test_gradient_that_was_replaced_cannot_be_named() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.arrive(0, 2, gradient(b"two"))
    with pytest.raises(ProtocolError, match="names gradient 1, in whose place gradient 2 has come"):
        ahead.claim(0, 1, 0, taken)
    assert taken == []


def test_gradient_that_a_push_waits_for_cannot_be_replaced() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.claim(0, 1, 0, taken)
    with pytest.raises(ProtocolError, match="waits for gradient 1, and gradient 2 has come instead"):
        ahead.arrive(0, 2, gradient(b"two"))
    assert taken == []


def test_nothing_is_left_after_clear() -> None:
    ahead, taken = SentAhead(), Taken()
    ahead.arrive(0, 1, gradient(b"one"))
    ahead.claim(1, 1, 0, taken)
    ahead.clear()
    ahead.claim(0, 1, 0, taken)
    ahead.arrive(1, 1, gradient(b"one"))
    assert taken == []
