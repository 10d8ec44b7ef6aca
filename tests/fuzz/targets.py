"""What reads bytes of others: each target takes any bytes, and has to read or refuse them. Anything else is a crash.

A crash is an exception that is not the refusal, or a document that is not the same once written and read.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from google.protobuf.message import Message

from torch_ps.common import codecs, schema
from torch_ps.common.errors import CheckpointError, CorruptFrame, ProtocolError
from torch_ps.common.optimizer_spec import changes_from_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, Piece
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.wire.field_ranges import MAX_WEIGHT, RANGES, check
from torch_ps.common.wire.frames import pack, unpack, unpack_all
from torch_ps.ps.checkpoint import manifest as manifests
from torch_ps.ps.checkpoint.tensor_file import TensorFile
from torch_ps.ps.core.ledger import Ledger
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.sample_assigner import SampleAssigner
from torch_ps.ps.engine.written_weights import of_push
from torch_ps.ps.transport.boundary import read_frames, read_request

Target = Callable[[bytes], None]

CODECS = ("none", "fp16", "bf16", "int8", "sign", "topk:0.1", "randk:0.1")

#: What the boundary reads, in the order of their names.
REQUESTS: list[type[Message]] = [getattr(pb, name) for name in sorted(RANGES)]

#: A bucket of three tensors.
BUCKET = Bucket(1, 0, "optimizer", 0, 6, (Piece(0, 0, 1, 0), Piece(1, 0, 2, 1), Piece(2, 0, 3, 3)))


def frame(data: bytes) -> None:
    """One frame, as a server and as a worker reads it."""
    for header_type in (pb.UpHeader, pb.DownHeader, pb.SeedHeader):
        with contextlib.suppress(CorruptFrame):
            header, payload = unpack(data, header_type)
            assert unpack(pack(header, (payload,)), header_type) == (header, payload)
            if isinstance(header, pb.UpHeader):
                _written(header.push, payload)


def _written(push: pb.Push, payload: memoryview) -> None:
    """What a push has written is refused, or is as long as the pieces that it names."""
    with contextlib.suppress(ProtocolError):
        if (found := of_push(BUCKET, "w0", 1, push, payload)) is not None:
            sizes = {position: len(values) // 4 for position, values in found.by_position(BUCKET).items()}
            assert sizes == {position: BUCKET.pieces[position].stop for position in push.written}


def message(data: bytes) -> None:
    """Frames that travel together."""
    with contextlib.suppress(CorruptFrame):
        for header, payload in unpack_all(data, pb.UpHeader):
            assert unpack(pack(header, (payload,)), pb.UpHeader) == (header, payload)


def request(data: bytes) -> None:
    """The request of any call, and the frames of an Exchange: what the boundary gives out is in range, and is used."""
    if not data:
        return
    kind, rest = REQUESTS[data[0] % len(REQUESTS)], data[1:]
    with contextlib.suppress(ProtocolError):
        read = read_request(rest, kind)
        check(read)
        if isinstance(read, pb.JoinRequest):
            schema.from_proto(read.model)
        if isinstance(read, pb.Push):
            changes_from_proto("SGD", read.hyper)
            assert 0 <= read.weight <= MAX_WEIGHT
    with contextlib.suppress(ProtocolError):
        assert all(header.push.weight <= MAX_WEIGHT for header, _ in read_frames(rest))


def document(data: bytes) -> None:
    """A whole document of a checkpoint, with its first line."""
    for kind in ("checkpoint", "shard"):
        with contextlib.suppress(CheckpointError):
            body(manifests.body_of(data, kind, "x.json"))


def body(data: bytes) -> None:
    """The second part of a document, whose digest fits: whoever makes it may make that, too."""
    with contextlib.suppress(CheckpointError):
        shard = manifests.parse_shard(data, "x.json")
        assert manifests.parse_shard(_rest(manifests.dump_shard(shard)), "x.json") == shard
    with contextlib.suppress(CheckpointError):
        whole = manifests.parse(data, "x.json")
        assert manifests.parse(_rest(manifests.dump(whole)), "x.json") == replace(whole, averaged=False)


def tensors(data: bytes) -> None:
    """The tensors of one shard."""
    with tempfile.NamedTemporaryFile(prefix="torch-ps-fuzz-") as file:
        Path(file.name).write_bytes(data)
        with contextlib.suppress(CheckpointError), TensorFile(file.name, "x.safetensors") as found:
            for key in found.keys:
                found.get(key)


def sections(data: bytes) -> None:
    """What the lead finds in a checkpoint whose digests fit: its roster, its samples, the ledger of a bucket."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        for machine in (Membership(quorum=1, lease=1.0), SampleAssigner(Mode()), Ledger(0)):
            with contextlib.suppress(*manifests.MALFORMED):
                machine.restore(found)


def payload(data: bytes) -> None:
    """The values of one bucket: what ``check`` lets through can be decoded."""
    if len(data) < 2:
        return
    name, numel = CODECS[data[0] % len(CODECS)], 1 + data[1]
    chosen, rest = codecs.codec(name), memoryview(data)[2:]
    with contextlib.suppress(CorruptFrame):
        chosen.check(rest, numel)
        assert chosen.decode(rest, torch.empty(numel)).shape == (numel,)


def _rest(data: bytes) -> bytes:
    return data.partition(b"\n")[2]


TARGETS: dict[str, Target] = {
    "frame": frame,
    "message": message,
    "request": request,
    "document": document,
    "body": body,
    "tensors": tensors,
    "sections": sections,
    "payload": payload,
}


def _example(kind: type[Message]) -> Message:
    """A message of a kind, with something in it."""
    model = schema.to_proto(Model("SGD", (Group((TensorSpec("w", (2,)),), {"lr": 0.5, "nesterov": False}),)))
    examples: dict[str, Message] = {
        "JoinRequest": pb.JoinRequest(worker="w0", model=model, incarnation=7, secret=bytes(16)),
        "Push": pb.Push(step=3, weight=4.0, codec="none", hyper={"lr": pb.HyperValue(number=0.5)}),
        "DataRequest": pb.DataRequest(worker="w0", data=pb.DataSet(name="d", size=10, seed=1), batch=2, epochs=1),
        "BallotRequest": pb.BallotRequest(worker="w0", paper=[pb.BallotPaper(accepted=pb.Term(number=2, server="x"))]),
    }
    return examples.get(kind.DESCRIPTOR.name) or kind()


def seeds() -> dict[str, list[bytes]]:
    """Inputs that are right, from which a fuzzer goes on."""
    push = pb.UpHeader(push=pb.Push(step=3, bucket=1, base=2, weight=4.0, codec="none", epoch=5))
    ahead = pb.UpHeader(ahead=pb.Ahead(bucket=1, number=9, codec="none"))
    named = pb.UpHeader(push=pb.Push(step=3, bucket=1, weight=4.0, ahead=9, absent=[1], written=[0, 2]))
    pull = pack(pb.UpHeader(pull=pb.Pull(bucket=7)))
    measure = pb.UpHeader(measure=pb.Measure(step=3, bucket=1, round=1, power=2.0, weight=4.0, arena_bytes=16))
    measured = pb.Measured(step=3, round=1, norm=[0.5, 2.0], contributor=["w0", "w1"], without=["w2"])
    facts = {
        "name": manifests.shard_name(12, 0, 1, "safetensors"),
        "size": 100,
        "sha256": hashlib.sha256(b"").hexdigest(),
    }
    whole = {
        "version": 12,
        "mode": "sync",
        "bucket_bytes": 4096,
        "model": {
            "optimizer": "SGD",
            "groups": [{"tensors": [["w", [3, 4], "float32"]], "hyper": {"lr": 0.1}}],
            "buffers": [["count", [], "int64"]],
        },
        "shards": [{**facts, "name": manifests.shard_name(12, 0, 1, "json")}],
        "sections": {"roster": {"epoch": 3}},
        "created": 1.5,
    }
    counters = {"late": 0, "nonfinite": 1, "staleness": [[0, 12]]}
    record = {**Ledger(0).as_dict(), "version": 12, "ledger": {"w0": [3, 11, 0, True]}}
    shard = {"version": 12, "shard": 0, "num_shards": 1, "tensors": facts, "records": [record], "counters": counters}
    bodies = [json.dumps(each).encode() for each in (whole, shard)]
    line = {"format": manifests.FORMAT, "kind": "checkpoint"}
    head = {**line, "size": len(bodies[0]), "sha256": hashlib.sha256(bodies[0]).hexdigest()}
    header = json.dumps({"0/values": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    left = {"name": "", "size": 8, "seed": 1, "shuffled": True, "epoch": 2, "left": [[0, 3], [5, 8]]}
    values = torch.linspace(-1.0, 1.0, 20)
    encoded = [bytes([n, 19]) + b"".join(codecs.codec(name).encode(values)) for n, name in enumerate(CODECS)]
    return {
        "frame": [
            pack(push, (bytes(16),)),
            pack(ahead, (bytes(24),)),
            pack(named, (bytes(16),)),
            pack(pb.DownHeader(bucket=1, version=3), (b"abcd",)),
            pack(measure),
            pack(pb.DownHeader(measured=measured)),
        ],
        "message": [pull + pull + pack(push, (bytes(16),)), pack(push) + pack(named) + pack(ahead, (bytes(24),))],
        "request": [bytes([number]) + _example(kind).SerializeToString() for number, kind in enumerate(REQUESTS)],
        "document": [json.dumps(head).encode() + b"\n" + bodies[0]],
        "body": bodies,
        "sections": [
            json.dumps(each).encode()
            for each in ({"epoch": 3, "members": [["w0", 2, None, 0], ["w1", 3, 1, 4]]}, {"sets": [left]}, record)
        ],
        "payload": encoded,
        "tensors": [len(header).to_bytes(8, "little") + header + bytes(8)],
    }
