"""Ranges of every field of every message that a server takes, and the check that applies them before anything else.

    message of a peer --parsed--> check() --in range--> job, core, engine
                                     '--> ProtocolError: nothing has changed

The table stands beside ``proto/parameter_server.proto``: it names each field of each message that can arrive, so a new
field has no place until somebody has thought about what a peer may put into it. ``ANY`` says that every value of the
field's protobuf type is safe, as later checks compare it with what the server knows: a step, a version, a session.

Rules of this file
  1. A range depends on nothing but the message. What depends on the job (is this bucket mine? is this step open?) is
     checked by the core and the engine, which raise ``PsError`` or nothing.
  2. Sums that many messages build up stay finite: the weights of 2**64 pushes of ``MAX_WEIGHT`` are below 2**118.
  3. Text is printable, as it reaches logs and the terminal of ``ps-status``.

Cost: about three microseconds for a push.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from torch_ps.common.errors import ProtocolError

#: Smallest weight above 0 and largest weight of a gradient: fp32 products with it neither vanish nor overflow for
#: gradients of usual size, and sums of whole weights are exact for long.
MIN_WEIGHT, MAX_WEIGHT = 2.0**-53, 2.0**53
#: Largest squared norm of one shard's part of an update: 2**40 elements of the largest fp32 number have 1.3e89.
MAX_SQUARE = 1e100
#: Characters of the name of a worker or a data set, of a server, of the name of a tensor, of a sentence.
MAX_WORKER, MAX_SERVER, MAX_TENSOR, MAX_SENTENCE = 100, 300, 1000, 1000
#: Bytes of the secret of a session or of a shard.
SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class Any_:
    """Every value of the field's type; a message is checked by its own ranges."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number from ``least`` to ``most``."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def allows(self, value: Any) -> bool:
        return bool(self.least <= value <= self.most)


@dataclass(frozen=True, slots=True)
class Real:
    """0, or a number from ``least`` to ``most``; never NaN.

    Attributes:
        zero: whether 0 is allowed though it is not between the two.
    """

    least: float
    most: float
    zero: bool = True

    def __str__(self) -> str:
        return f"{'0 or ' if self.zero else ''}a number from {self.least:g} to {self.most:g}"

    def allows(self, value: Any) -> bool:
        return bool(self.least <= value <= self.most or (self.zero and value == 0))


@dataclass(frozen=True, slots=True)
class Text:
    """Printable text of ``least`` to ``most`` characters."""

    most: int
    least: int = 0

    def __str__(self) -> str:
        return f"printable text of {self.least} to {self.most} characters"

    def allows(self, value: Any) -> bool:
        return self.least <= len(value) <= self.most and (not value or bool(value.isprintable()))


@dataclass(frozen=True, slots=True)
class Data:
    """At most ``most`` bytes."""

    most: int

    def __str__(self) -> str:
        return f"at most {self.most} bytes"

    def allows(self, value: Any) -> bool:
        return len(value) <= self.most


@dataclass(frozen=True, slots=True)
class Many:
    """At most ``most`` entries of a repeated field or a map, each in the range ``each``; a map's keys are ``Text``."""

    most: int
    each: Range = Any_()
    key: Text | None = None

    def __str__(self) -> str:
        return f"at most {self.most} entries, each {self.each}"

    def allows(self, value: Any) -> bool:
        if len(value) > self.most:
            return False
        return isinstance(self.each, Any_) or all(map(self.each.allows, value))


Range = Any_ | Whole | Real | Text | Data | Many

ANY = Any_()
WEIGHT = Real(MIN_WEIGHT, MAX_WEIGHT)
WORKER, SERVER, TENSOR, SENTENCE = Text(MAX_WORKER), Text(MAX_SERVER), Text(MAX_TENSOR), Text(MAX_SENTENCE)
CODEC, TYPE, ID = Text(100), Text(40), Text(200)
#: Secret of a session or of a shard; a shorter one is nobody's.
SECRET = Data(SECRET_BYTES)
#: Positions of pieces in one bucket: a bucket of 4 MiB has not more values.
PIECES = Many(1 << 20)

#: By message, the range of each of its fields.
RANGES: dict[str, dict[str, Range]] = {
    # ------------------------------------------------------------ model
    "TensorSpec": {"name": TENSOR, "shape": Many(64), "dtype": TYPE, "copied": ANY},
    "HyperValue": {
        "number": ANY,
        "integer": ANY,
        "flag": ANY,
        "text": Text(200),
        "numbers": ANY,
        "none": ANY,
        "type": TYPE,
    },
    "NumberList": {"value": Many(64), "type": Many(64, TYPE)},
    "ParameterGroup": {"tensor": Many(100_000), "hyper": Many(64, key=Text(200))},
    "Model": {"optimizer": Text(200), "group": Many(10_000), "buffer": Many(100_000)},
    # ------------------------------------------------------------ membership
    "Version": {"package": TYPE, "wire": ANY},
    "DescribeRequest": {"model": ANY, "version": ANY},
    "EnterRequest": {"shard": ANY, "num_shards": ANY, "version": ANY, "secret": SECRET},
    "JoinRequest": {
        "worker": Text(MAX_WORKER, 1),
        "rank": ANY,
        "model": ANY,
        "version": ANY,
        "incarnation": ANY,
        "secret": SECRET,
    },
    "SeedHeader": {"worker": WORKER, "session": ANY, "model": ANY, "incarnation": ANY, "bucket": ANY, "secret": SECRET},
    "ArenaOffer": {"host": ID, "pid": ANY, "fd": ANY, "token": Data(64), "size": ANY},
    "ShareRequest": {
        "worker": WORKER,
        "session": ANY,
        "gradients": ANY,
        "answers": ANY,
        "dialled_port": ANY,
        "secret": SECRET,
    },
    "RenewRequest": {"worker": WORKER, "session": ANY, "incarnation": ANY, "secret": SECRET},
    "LeaveRequest": {"worker": WORKER, "session": ANY, "secret": SECRET},
    "DataSet": {"name": WORKER, "size": ANY, "seed": ANY, "shuffled": ANY},
    "DataRequest": {
        "worker": WORKER,
        "session": ANY,
        "data": ANY,
        "batch": ANY,
        "epochs": ANY,
        "wait": ANY,
        "give_back": ANY,
        "received": ANY,
        "together": ANY,
        "number": ANY,
        "secret": SECRET,
    },
    "WatchRequest": {"incarnation": ANY, "shard": ANY, "secret": SECRET},
    # ------------------------------------------------------------ exchange
    "UpHeader": {
        "hello": ANY,
        "push": ANY,
        "pull": ANY,
        "renew": ANY,
        "ahead": ANY,
        "ballot": ANY,
        "measure": ANY,
    },
    "Hello": {
        "worker": WORKER,
        "session": ANY,
        "pull_codec": CODEC,
        "version": ANY,
        "incarnation": ANY,
        "secret": SECRET,
    },
    "Ahead": {"bucket": ANY, "number": ANY, "codec": CODEC},
    "Covers": {"number": ANY, "samples": ANY},
    "Push": {
        "step": ANY,
        "bucket": ANY,
        "base": ANY,
        "weight": WEIGHT,
        "codec": CODEC,
        "epoch": ANY,
        "hyper": Many(64, key=Text(200)),
        "missing": ANY,
        "ahead": ANY,
        "absent": PIECES,
        "written": PIECES,
        "arena_bytes": ANY,
        "covers": Many(1024),
        "nonfinite": ANY,
    },
    "Pull": {"bucket": ANY},
    "Measure": {
        "step": ANY,
        "bucket": ANY,
        "round": ANY,
        "power": Real(1e-3, float("inf"), zero=False),
        "weight": WEIGHT,
        "epoch": ANY,
        "arena_bytes": ANY,
        "ahead": ANY,
        "missing": ANY,
    },
    "Renew": {},
    # ------------------------------------------------------------ other shards
    "NormRequest": {
        "shard": ANY,
        "worker": WORKER,
        "session": ANY,
        "step": ANY,
        "square": Real(0.0, MAX_SQUARE),
        "incarnation": ANY,
        "secret": SECRET,
    },
    "KeptRequest": {
        "shard": ANY,
        "version": ANY,
        "size": Whole(0, 1 << 50),
        "sha256": Text(64),
        "error": SENTENCE,
        "incarnation": ANY,
        "secret": SECRET,
    },
    "StatusRequest": {"version": ANY},
    "TraceRequest": {"worker": WORKER, "session": ANY, "shard": ANY, "part": ANY, "incarnation": ANY, "secret": SECRET},
    "TracePart": {
        "host": ID,
        "pid": ANY,
        "word": Many(4096, ID),
        "span": Many(1 << 20),
        "error": ANY,
        "dropped": ANY,
    },
    "TraceSpan": {
        "name": ANY,
        "thread": ANY,
        "worker": ANY,
        "step": ANY,
        "bucket": ANY,
        "start": ANY,
        "duration": ANY,
    },
    # ------------------------------------------------------------ hot standby
    "ReplicaUp": {"hello": ANY, "received": ANY, "failed": SENTENCE},
    "ReplicaHello": {"server": Text(MAX_SERVER, 1), "version": ANY},
    "Term": {"number": Whole(0, 1 << 62), "server": SERVER},
    "Configuration": {"term": ANY, "standby": SERVER},
    "BallotPaper": {"vote": ANY, "accepted": ANY, "standby": SERVER},
    "Vote": {"term": ANY, "granted": ANY, "promised": ANY, "served": ANY},
    "BallotRequest": {"worker": WORKER, "session": ANY, "take_over": ANY, "paper": Many(16), "secret": SECRET},
}

_Check = Callable[[Any], str]


def check(message: Message, sender: str = "") -> None:
    """Check every field of a message that a peer has sent, and of the messages in it.

    Args:
        message: One of the messages of ``RANGES``.
        sender: Who sent it, for the error: "worker 'w1'".

    Raises:
        ProtocolError: A field is out of its range; the text names the sender, the field, its value and the range.
    """
    if wrong := _check_of(message.DESCRIPTOR)(message):
        raise ProtocolError(f"{sender + ': ' if sender else ''}{wrong}")


@functools.cache
def _check_of(descriptor: Descriptor) -> _Check:
    """A function of one message that returns what is wrong with it, "" if nothing is."""
    oneofs = [each.name for each in descriptor.oneofs if len(each.fields) > 1]
    alone = [f for f in descriptor.fields if f.containing_oneof is None or len(f.containing_oneof.fields) == 1]
    checks = tuple(each for field in alone if (each := _field_check(descriptor, field)) is not None)
    chosen = {f.name: _field_check(descriptor, f) for f in descriptor.fields if f not in alone}

    def found(message: Any) -> str:
        for each in checks:
            if wrong := each(message):
                return wrong
        for oneof in oneofs:
            name = message.WhichOneof(oneof)
            if name is not None and (one := chosen[name]) is not None and (wrong := one(message)):
                return wrong
        return ""

    return found


def _field_check(owner: Descriptor, field: FieldDescriptor) -> _Check | None:
    """The same of one field of ``owner``; None where nothing can be wrong."""
    name, what, allowed = field.name, f"{owner.name}.{field.name}", RANGES[owner.name][field.name]
    inner, is_map = field.message_type, False
    if inner is not None and inner.GetOptions().map_entry:
        inner, is_map = inner.fields_by_name["value"].message_type, True
    if field.is_repeated:
        return _repeated_check(name, what, allowed, inner, is_map=is_map)
    if inner is not None:
        check_inner = _check_of(inner) if _has_ranges(inner, ()) else None
        if check_inner is None:
            return None
        return lambda message: check_inner(getattr(message, name)) if message.HasField(name) else ""
    if isinstance(allowed, Any_):
        return None

    def wrong(message: Any) -> str:
        value = getattr(message, name)
        return "" if allowed.allows(value) else f"{what} is {_shown(value)}; it has to be {allowed}"

    return wrong


def _repeated_check(name: str, what: str, allowed: Range, inner: Descriptor | None, *, is_map: bool) -> _Check:
    if not isinstance(allowed, Many):
        raise TypeError(f"{what} is repeated: its range has to be Many")
    check_each = _check_of(inner) if inner is not None and _has_ranges(inner, ()) else None

    def wrong(message: Any) -> str:
        values = getattr(message, name)
        if not values:
            return ""
        if not allowed.allows(values):
            first = next((v for v in values if not (isinstance(allowed.each, Any_) or allowed.each.allows(v))), None)
            shown = f"{len(values)} entries" if len(values) > allowed.most else _shown(first)
            return f"{what} has {shown}; it has to have {allowed}"
        if is_map and allowed.key is not None and (key := next((k for k in values if not allowed.key.allows(k)), None)):
            return f"{what} has the key {_shown(key)}; it has to be {allowed.key}"
        if check_each is not None:
            return next(filter(None, map(check_each, values.values() if is_map else values)), "")
        return ""

    return wrong


def _has_ranges(descriptor: Descriptor, within: Sequence[str]) -> bool:
    """Whether any field of a message, or of one in it, can be out of its range."""
    for field in descriptor.fields:
        if not isinstance(RANGES[descriptor.name][field.name], Any_) or field.is_repeated:
            return True
        inner = field.message_type
        if inner is not None and inner.name not in within and _has_ranges(inner, (*within, descriptor.name)):
            return True
    return False


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({len(text)} characters)"
