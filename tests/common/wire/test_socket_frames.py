"""Messages on a socket: what is put comes out of a ``Receiver``, however the bytes arrive."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import port_proof
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES, Frame, Split, join, pack, split, unpack, unpack_all
from torch_ps.common.wire.socket_frames import PREFIX, READ_AHEAD, Receiver, put

PUSH = pb.UpHeader(push=pb.Push(step=3, bucket=1, weight=1.0, codec="none"))


def received(receiver: Receiver, data: bytes, chunk: int) -> list[tuple[Frame, bool]]:
    """What comes out when ``data`` arrives ``chunk`` bytes at a time."""
    found, left = [], memoryview(data)
    while left:
        room = receiver.room()
        count = min(chunk, len(room), len(left))
        room[:count] = left[:count]
        receiver.add(count)
        left = left[count:]
        while (message := receiver.next()) is not None:
            found.append(message)
    return found


@given(
    st.lists(st.sampled_from([0, 1, 100, READ_AHEAD - 40, READ_AHEAD, 3 * READ_AHEAD]), max_size=6),
    st.sampled_from([7, 1000, READ_AHEAD, 1 << 20]),
)
def test_messages_come_out_as_they_were_put_however_the_bytes_arrive(sizes: list[int], chunk: int) -> None:
    frames = [split(PUSH, [bytes([size % 251]) * size] if size else []) for size in sizes]
    data = b"".join(b"".join(put(frame)) for frame in frames)
    found = received(Receiver(), data, chunk)
    assert [join(message) for message, _ in found] == [join(frame) for frame in frames]
    assert not any(end for _, end in found)


def test_long_head_and_the_end_come_out_too() -> None:
    head = pack(PUSH, [bytes(2 * READ_AHEAD)])
    assert received(Receiver(), b"".join([*put(head), *put(b"why", end=True)]), 1000) == [(head, False), (b"why", True)]


def test_split_frame_is_that_of_pack_and_keeps_its_payload_where_it_is() -> None:
    values = bytearray(range(100))
    frame = split(PUSH, [values[:3], memoryview(values)[3:]])
    assert isinstance(frame, Split)
    assert join(frame) == pack(PUSH, [bytes(values)])
    assert unpack(frame, pb.UpHeader) == (PUSH, memoryview(bytes(values)))
    assert frame.payload[1].obj is values


def test_bytes_before_the_messages_can_be_taken() -> None:
    receiver = Receiver()
    assert receiver.take(5) is None
    receiver.room()[:8] = b"helloyou"
    receiver.add(8)
    assert receiver.take(5) == b"hello"
    assert receiver.take(5) is None


@pytest.mark.parametrize("lengths", [(MAX_MESSAGE_BYTES + 1, 0), (1, MAX_MESSAGE_BYTES)])
def test_message_that_is_too_long_is_refused_before_anything_is_allocated(lengths: tuple[int, int]) -> None:
    receiver = Receiver()
    with pytest.raises(CorruptFrame, match=f"a message of {MAX_MESSAGE_BYTES + 1} bytes"):
        received(receiver, PREFIX.pack(*lengths), 8)
    assert len(receiver.room()) <= READ_AHEAD


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_make_messages_or_are_refused(data: bytes, chunk: int) -> None:
    with contextlib.suppress(CorruptFrame):
        for message, _ in received(Receiver(), data, chunk):
            with contextlib.suppress(CorruptFrame):
                list(unpack_all(message, pb.UpHeader))


def test_payload_is_received_where_it_is_to_be() -> None:
    home = memoryview(bytearray(READ_AHEAD * 2))
    receiver = Receiver(lambda head, size: home if size == len(home) else None)
    frames = [split(PUSH, [bytes([n]) * size]) for n, size in enumerate((len(home), 50))]
    data = b"".join(b"".join(put(frame)) for frame in frames)
    assert [join(message) for message, _ in received(receiver, data, 1 << 20)] == [join(frame) for frame in frames]
    assert bytes(home) == bytes(len(home))


def test_proof_holds_between_two_who_know_the_token_and_for_nobody_else() -> None:
    greeting = port_proof.greet()
    reply, expected = port_proof.answer(b"t" * 16, greeting)
    assert port_proof.place_of(greeting) is not None
    assert port_proof.place_of(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[: port_proof.GREETING_BYTES]) is None
    assert port_proof.prove(b"t" * 16, greeting, reply) == expected
    assert port_proof.prove(b"u" * 16, greeting, reply) is None
    assert port_proof.prove(b"t" * 16, port_proof.greet(), reply) is None


def test_greeting_says_which_connection_of_how_many_it_is() -> None:
    places = port_proof.places(port_proof.MAX_CONNECTIONS)
    assert [port_proof.place_of(port_proof.greet(place)) for place in places] == places
    assert [place.number for place in places] == list(range(port_proof.MAX_CONNECTIONS))
    for number, count in ((0, 0), (3, 3), (0, port_proof.MAX_CONNECTIONS + 1)):
        wrong = port_proof.Place(places[0].group, number, count)
        assert port_proof.place_of(port_proof.greet(wrong)) is None
