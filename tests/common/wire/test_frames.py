"""Frames are what protobuf would write, byte for byte, and nothing that a peer sends does more than raise."""

import contextlib
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import MAX_FRAMES, join, messages, pack, unpack, unpack_all

PUSH = pb.UpHeader(push=pb.Push(step=3, bucket=7, base=2, weight=0.5, codec="fp16", epoch=1))
PAYLOADS = st.one_of(st.binary(max_size=300), st.sampled_from([bytes(127), bytes(128), bytes(16384), bytes(1 << 21)]))


@given(PAYLOADS)
def test_up_frame_is_the_bytes_of_protobuf(payload: bytes) -> None:
    assert pack(PUSH, (payload,) if payload else ()) == pb.UpFrame(header=[PUSH], payload=payload).SerializeToString()


@given(PAYLOADS)
def test_protobuf_reads_what_is_packed(payload: bytes) -> None:
    frame = pb.UpFrame.FromString(pack(PUSH, (payload,)))
    assert (list(frame.header), frame.payload) == ([PUSH], payload)


@given(PAYLOADS)
def test_what_protobuf_writes_is_read(payload: bytes) -> None:
    header = pb.DownHeader(bucket=1, version=300, contributor=["w0", "w1"])
    found, rest = unpack(pb.DownFrame(header=[header], payload=payload).SerializeToString(), pb.DownHeader)
    assert (found, bytes(rest)) == (header, payload)


@given(st.lists(st.binary(max_size=50), max_size=4))
def test_parts_of_a_payload_are_joined_in_order(parts: list[bytes]) -> None:
    mixed = [memoryview(part) if number % 2 else bytearray(part) for number, part in enumerate(parts)]
    assert bytes(unpack(pack(PUSH, mixed), pb.UpHeader)[1]) == b"".join(parts)


@given(st.lists(st.binary(max_size=3), max_size=20))
def test_frames_that_travel_together_come_out_one_by_one(payloads: list[bytes]) -> None:
    frames = [pack(pb.UpHeader(pull=pb.Pull(bucket=n)), [p] if p else ()) for n, p in enumerate(payloads)]
    sent = list(messages(frames))
    found = [frame for message in sent for frame in unpack_all(message, pb.UpHeader)]
    assert [header.pull.bucket for header, _ in found] == list(range(len(payloads)))
    assert [bytes(payload) for _, payload in found] == payloads
    # Those with a payload travel alone, all between two of them together; protobuf reads the same.
    runs = [len(list(run)) if alone else 1 for alone, run in groupby(payloads, key=bool)]
    assert len(sent) == sum(runs)
    assert sum(len(pb.UpFrame.FromString(join(message)).header) for message in sent) == len(frames)


def test_message_of_too_many_frames_is_refused() -> None:
    frames = [pack(pb.UpHeader(renew=pb.Renew()))] * (MAX_FRAMES + 1)
    assert [len(list(unpack_all(message, pb.UpHeader))) for message in messages(frames)] == [MAX_FRAMES, 1]
    with pytest.raises(CorruptFrame, match="more than 256 frames"):
        list(unpack_all(b"".join(frames), pb.UpHeader))


def test_payload_is_a_view_and_not_a_copy() -> None:
    frame = pack(PUSH, (bytes(1000),))
    assert unpack(frame, pb.UpHeader)[1].obj is frame


@given(st.integers(0, 200))
def test_frame_that_was_cut_off_is_refused(length: int) -> None:
    frame = pack(PUSH, (bytes(150),))
    # Cut right after the header, a frame is whole: it is one without a payload.
    whole = {len(frame), len(pack(PUSH))}
    if length in whole or length > len(frame):
        return
    with pytest.raises(CorruptFrame):
        unpack(frame[:length], pb.UpHeader)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(frame: bytes) -> None:
    with contextlib.suppress(CorruptFrame):
        header, payload = unpack(frame, pb.UpHeader)
        assert unpack(pack(header, (payload,)), pb.UpHeader) == (header, payload)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "expected field tag 0x0a at byte 0"),
        (b"\x12\x00", "expected field tag 0x0a at byte 0"),
        (b"\x0a", "unreadable length at byte 1"),
        (b"\x0a\x80\x80\x80\x80\x80\x01", "unreadable length"),
        (b"\x0a\x02a", "truncated: a field of 2 bytes starts at byte 2"),
        (b"\x0a\x00\x0a\x00", "expected field tag 0x12 at byte 2"),
        (b"\x0a\x00\x12\x01ab", "1 bytes after its payload"),
        (b"\x0a\x01\x0f", "not a UpHeader"),
    ],
)
def test_refusal_says_what_is_wrong_and_where(frame: bytes, message: str) -> None:
    with pytest.raises(CorruptFrame, match=message):
        unpack(frame, pb.UpHeader)
