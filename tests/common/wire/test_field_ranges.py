"""What is out of the range of its field is refused by name, and every field has one."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from torch_ps.common.errors import ProtocolError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.field_ranges import MAX_WEIGHT, MIN_WEIGHT, RANGES, check

#: Messages that are frames, cut by ``frames.py``, and the header of each.
HEADERS: dict[str, Any] = {"UpFrame": pb.UpHeader, "SeedFrame": pb.SeedHeader}


def inside(descriptor: Descriptor) -> Iterator[Descriptor]:
    """A message and all that can be in it."""
    if not descriptor.GetOptions().map_entry:
        yield descriptor
    for field in descriptor.fields:
        if field.message_type is not None:
            yield from inside(field.message_type)


def arriving() -> dict[str, Descriptor]:
    """Every message that a server takes, by the contract."""
    methods = pb.DESCRIPTOR.services_by_name["ParameterServer"].methods
    inputs = [HEADERS[m.input_type.name].DESCRIPTOR if m.input_type.name in HEADERS else m.input_type for m in methods]
    return {each.name: each for descriptor in inputs for each in inside(descriptor)}


def test_every_field_that_can_arrive_has_a_range() -> None:
    """A new field has to be thought about: what happens at its largest value, at its longest text?"""
    assert {name: set(ranges) for name, ranges in RANGES.items()} == {
        name: {field.name for field in descriptor.fields} for name, descriptor in arriving().items()
    }


def test_every_message_can_be_checked_empty() -> None:
    for name in RANGES:
        message = getattr(pb, name)()
        if name not in ("JoinRequest", "ReplicaHello", "Measure"):  # what these need is not there
            check(message)


NAN = float("nan")
BAD: list[tuple[Message, str]] = [
    (pb.Push(weight=NAN), "Push.weight is nan"),
    (pb.Push(weight=1e308), r"Push.weight is 1e\+308; it has to be 0 or a number from 1.11022e-16 to 9.0072e\+15"),
    (pb.Push(weight=1e-300), "Push.weight is 1e-300"),
    (pb.Push(weight=-1.0), "Push.weight is -1"),
    (pb.Push(codec="x" * 101), r"Push.codec is 'x+\.\.\. \(103 characters\); it has to be printable text of 0 to 100"),
    (pb.Push(covers=[pb.Covers()] * 1025), "Push.covers has 1025 entries; it has to have at most 1024"),
    (pb.Push(hyper={"l\nr": pb.HyperValue(flag=True)}), r"Push.hyper has the key 'l\\nr'; it has to be printable"),
    (pb.SeedHeader(model=pb.Model(buffer=[pb.TensorSpec(shape=[1] * 65)])), "TensorSpec.shape has 65 entries"),
    (pb.UpHeader(measure=pb.Measure(power=0.0)), "Measure.power is 0.0; it has to be a number from 0.001 to inf"),
    (pb.UpHeader(measure=pb.Measure(power=NAN)), "Measure.power is nan"),
    (pb.UpHeader(hello=pb.Hello(worker="w\x1b[2J")), r"Hello.worker is 'w\\x1b\[2J'; it has to be printable text"),
    (pb.JoinRequest(), "JoinRequest.worker is ''; it has to be printable text of 1 to 100 characters"),
    (pb.JoinRequest(worker="w", model=pb.Model(optimizer="x" * 201)), "Model.optimizer is"),
    (pb.NormRequest(square=float("inf")), "NormRequest.square is inf"),
    (
        pb.BallotRequest(paper=[pb.BallotPaper(accepted=pb.Term(number=2**64 - 1))]),
        "Term.number is 184467440737",
    ),
    (pb.TraceRequest(part=pb.TracePart(word=["x" * 201])), "TracePart.word has 'xxx"),
]


@pytest.mark.parametrize(("message", "text"), BAD, ids=[text.split()[0] + str(n) for n, (_, text) in enumerate(BAD)])
def test_field_out_of_its_range_is_refused_by_name(message: Message, text: str) -> None:
    with pytest.raises(ProtocolError, match=f"^worker 'w1': {text}"):
        check(message, "worker 'w1'")


@pytest.mark.parametrize("weight", [0.0, MIN_WEIGHT, 1.0, MAX_WEIGHT])
def test_weights_of_the_range_are_taken(weight: float) -> None:
    check(pb.UpHeader(push=pb.Push(weight=weight)))
