"""Frames: a small protobuf header, then the payload, cut and joined without copying the payload twice.

``UpFrame``, ``DownFrame`` and ``SeedFrame`` have the same two fields::

    0x0a  varint(len(header))  header  0x12  varint(len(payload))  payload

Frames without a payload that wait for the same stream are sent as one message, one after the other: to protobuf the
header is a repeated field. A round trip takes 0.4 ms, so that matters for small buckets and for shared memory.

A frame that a socket carries stays *split*: the payload is sent from where it is, and received where it stays.

protobuf's own parser would copy the payload out of the message, which for megabytes of gradient costs more than the
parsing. So protobuf parses the header only, and the payload is a ``memoryview`` of the message that gRPC received. The
bytes written here are those that protobuf would write; a test compares them.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from torch_ps.common.errors import CorruptFrame

#: Most fp32 bytes of a bucket.
MAX_BUCKET_BYTES = 4 << 20
#: Longest message that either side accepts: one bucket and its header.
MAX_MESSAGE_BYTES = MAX_BUCKET_BYTES + (1 << 20)

#: Most frames of one message, so that no frame waits long for its turn.
MAX_FRAMES = 256

_HEADER = 0x0A  # field 1, length-delimited
_PAYLOAD = 0x12  # field 2, length-delimited

Buffer = bytes | bytearray | memoryview
Header = TypeVar("Header", bound=Message)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A frame with a payload that is not joined to its header.

    Attributes:
        head: The header field, as in the joined frame.
        payload: The payload in parts, at least one, which do not change while the frame is in use.
        intact: Whether the payload is still that of the header. A payload that the sender shares with others may
            change after all; what was sent of it must not be used then.
    """

    head: bytes
    payload: tuple[memoryview, ...]
    intact: Callable[[], bool] | None = None

    def __len__(self) -> int:
        return len(self.head) + sum(map(len, self.payload))


#: One frame; of those without a payload, also several, one after the other.
Frame = bytes | Split


def split(header: Message, payload: Iterable[Buffer], intact: Callable[[], bool] | None = None) -> Frame:
    """Serialize one frame without copying its payload; without parts it is that of ``pack``."""
    parts = tuple([memoryview(part).cast("B") for part in payload])
    head = header.SerializeToString()
    start = bytes((_HEADER,)) + _varint(len(head)) + head
    return Split(start, parts, intact) if parts else start


def join(frame: Frame) -> bytes:
    """The frame as bytes. Cost: one copy of a payload that is split."""
    if isinstance(frame, bytes):
        return frame
    size = sum(map(len, frame.payload))
    return b"".join((frame.head, bytes((_PAYLOAD,)), _varint(size), *frame.payload))


def payload_of(frame: Frame, size: int) -> memoryview:
    """The payload of a frame of this process, ``size`` bytes."""
    if isinstance(frame, Split):
        return frame.payload[0] if len(frame.payload) == 1 else memoryview(b"".join(frame.payload))
    return memoryview(frame)[len(frame) - size :]


def pack(header: Message, payload: Iterable[Buffer] = ()) -> bytes:
    """Serialize one frame. The payload is joined from its parts; without parts the frame has no payload field.

    Cost: one copy of the payload.
    """
    head = header.SerializeToString()
    parts = tuple(payload)
    start = bytes((_HEADER,)) + _varint(len(head)) + head
    if not parts:
        return start
    size = sum(len(part) if isinstance(part, (bytes, bytearray)) else part.nbytes for part in parts)
    return b"".join((start, bytes((_PAYLOAD,)), _varint(size), *parts))


def unpack(frame: Frame | memoryview, header_type: type[Header]) -> tuple[Header, memoryview]:
    """Parse one frame into its header and a view of its payload, empty if there is none.

    Raises:
        CorruptFrame: the bytes are not exactly one header and at most one payload.

    Cost: no copy of the payload, unless it is split into several parts; the view keeps it alive.
    """
    if isinstance(frame, Split):
        parts = frame.payload
        return unpack(frame.head, header_type)[0], parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
    view = memoryview(frame)
    head, rest = _field(view, 0, _HEADER)
    payload, end = _field(view, rest, _PAYLOAD) if rest < len(view) else (view[:0], rest)
    if end != len(view):
        raise CorruptFrame(f"frame of {len(view)} bytes has {len(view) - end} bytes after its payload")
    try:
        return header_type.FromString(bytes(head)), payload
    except DecodeError as error:
        raise CorruptFrame(f"header of {len(head)} bytes is not a {header_type.DESCRIPTOR.name}") from error


def unpack_all(message: Frame, header_type: type[Header]) -> Iterator[tuple[Header, memoryview]]:
    """Parse the frames of one message, in order; only the last one may have a payload.

    Raises:
        CorruptFrame: a frame is malformed, or there are more than ``MAX_FRAMES``.
    """
    if isinstance(message, Split):
        yield _unpack_split(message, header_type)
        return
    view, at = memoryview(message), 0
    for _ in range(MAX_FRAMES):
        end = _field(view, at, _HEADER)[1]
        if end == len(view) or view[end] != _HEADER:
            yield unpack(message if at == 0 else view[at:], header_type)
            return
        yield unpack(view[at:end], header_type)
        at = end
    raise CorruptFrame(f"message of {len(view)} bytes has more than {MAX_FRAMES} frames")


def _unpack_split(message: Split, header_type: type[Header]) -> tuple[Header, memoryview]:
    if _field(memoryview(message.head), 0, _HEADER)[1] != len(message.head):
        raise CorruptFrame(f"the {len(message.head)} bytes before a payload are not one header")
    return unpack(message, header_type)


def messages(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Join ``frames``, in their order, into as few messages as possible; one with a payload stays alone."""
    run: list[bytes] = []
    for frame in frames:
        if isinstance(frame, Split):
            if run:
                yield b"".join(run)
                run = []
            yield frame
            continue
        alone = _has_payload(frame)
        if run and (alone or len(run) == MAX_FRAMES):
            yield b"".join(run)
            run = []
        if alone:
            yield frame
        else:
            run.append(frame)
    if run:
        yield b"".join(run)


def take_message(frames: deque[Frame]) -> Frame:
    """Take frames from the left of ``frames``, which is not empty, as many as share one message, and join them."""
    first = frames.popleft()
    if isinstance(first, Split) or _has_payload(first):
        return first
    run = [first]
    while frames and len(run) < MAX_FRAMES:
        following = frames[0]
        if isinstance(following, Split) or _has_payload(following):
            break
        run.append(following)
        frames.popleft()
    return run[0] if len(run) == 1 else b"".join(run)


def _has_payload(frame: bytes) -> bool:
    return _field(memoryview(frame), 0, _HEADER)[1] < len(frame)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(view: memoryview, at: int, tag: int) -> tuple[memoryview, int]:
    """The length-delimited field that starts at byte ``at``, and the byte after its end."""
    if at >= len(view) or view[at] != tag:
        raise CorruptFrame(f"frame of {len(view)} bytes: expected field tag {tag:#04x} at byte {at}")
    length, shift, at = 0, 0, at + 1
    while True:
        if at >= len(view) or shift > 28:
            raise CorruptFrame(f"frame of {len(view)} bytes: unreadable length at byte {at}")
        byte = view[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    if at + length > len(view):
        raise CorruptFrame(f"frame of {len(view)} bytes is truncated: a field of {length} bytes starts at byte {at}")
    return view[at : at + length], at + length
