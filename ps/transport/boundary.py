"""Boundary: the one place where bytes of peers become messages. What comes out of it is in the ranges of the contract.

    bytes --parse--> message --ranges (``common/wire/field_ranges.py``)--> handler, job, core, engine
             '--> CorruptFrame          '--> ProtocolError

Rules of this file
  1. No other file of a server parses what a peer has sent to it; ``tests/test_layout.py`` sees to that.
"""

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.field_ranges import check
from torch_ps.common.wire.frames import Frame, unpack, unpack_all

Request = TypeVar("Request", bound=Message)

#: Frames of an Exchange that carry a payload.
WITH_PAYLOAD = ("push", "ahead", "measure")


def read_request(data: bytes, request_type: type[Request]) -> Request:
    """Read the one message of a call.

    Raises:
        CorruptFrame: The bytes are no such message.
        ProtocolError: A field is out of its range.
    """
    try:
        request = request_type.FromString(data)
    except DecodeError:
        raise CorruptFrame(f"{len(data)} bytes are not a {request_type.DESCRIPTOR.name}") from None
    check(request, _sender(request))
    return request


def read_seed_frame(data: bytes) -> tuple[pb.SeedHeader, memoryview]:
    """Read one frame of Seed: its header, and a view of its payload.

    Raises:
        CorruptFrame: The bytes are no such frame, or the first one has a payload.
        ProtocolError: A field is out of its range.
    """
    header, payload = unpack(data, pb.SeedHeader)
    check(header, _sender(header))
    if len(payload) and header.HasField("model"):
        raise CorruptFrame(f"{_sender(header)}: the frame with the model has a payload of {len(payload)} bytes")
    return header, payload


def read_frames(data: Frame, sender: str = "") -> Iterator[tuple[pb.UpHeader, memoryview]]:
    """Read the frames of one message of an Exchange, in order: headers, and views of payloads.

    Args:
        data: The message.
        sender: Who has sent it, for errors; "" where the first frame is to say so.

    Raises:
        CorruptFrame: A frame is malformed or has a payload that it cannot have, or there are too many.
        ProtocolError: A field is out of its range. Frames before it have been given out.
    """
    for header, payload in unpack_all(data, pb.UpHeader):
        check(header, sender)
        if len(payload) and (kind := header.WhichOneof("kind")) not in WITH_PAYLOAD:
            raise CorruptFrame(
                f"{sender or 'a peer'} sends a payload of {len(payload)} bytes with {kind}, which has none"
            )
        yield header, payload


def _sender(request: Message) -> str:
    worker = getattr(request, "worker", "")
    return f"worker {worker[:100]!r}" if worker else ""
