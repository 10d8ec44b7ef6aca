"""Bad input gets a clear error at once and costs nobody anything: after each case two other workers train on.

What no client of ours would send is sent with gRPC directly.
"""

import math
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.pair import SIZE, SPEC, Pair, model, pair
from tests.support.raw import Raw, described, raw
from tests.support.threads import at_once
from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import address
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES, pack

X = torch.zeros(SIZE)
NEGATIVE = pb.TensorSpec(name="x", shape=[-4], dtype="float32")


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    with pair() as workers:
        yield workers


@pytest.fixture(autouse=True)
def _others_go_on(running: Pair) -> Iterator[None]:
    yield
    running.train()


@pytest.fixture
def peer(running: Pair) -> Iterator[Raw]:
    with raw(running.servers.addresses[0]) as connection:
        yield connection


# ------------------------------------------------------------------ joining


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"worker 'w2' has tensor 'x' \[3, 4\] float32 where the job has 'x' \[8\] float32"),
        (
            {"y": X},
            r"'y' \[8\] float32 where the job has 'x' \[8\] float32; every worker of a job trains the same model",
        ),
        ({"x": X.double()}, r"'x' \[8\] float64 where the job has 'x' \[8\] float32"),
        ({"x": X, "more": X}, r"only worker 'w2' has tensor 'more' \[8\] float32"),
    ],
)
def test_another_model_is_refused_with_the_first_differing_tensor(
    running: Pair, params: dict[str, torch.Tensor], message: str
) -> None:
    with (
        torch_ps.Client(str(running.servers), name="w2") as client,
        pytest.raises(torch_ps.ModelMismatch, match=message),
    ):
        client.init(params, SPEC)


def test_another_optimizer_is_refused_by_name(running: Pair) -> None:
    with (
        torch_ps.Client(str(running.servers), name="w2") as client,
        pytest.raises(torch_ps.ModelMismatch, match="optimizer Adam; the job uses SGD"),
    ):
        client.init(model(), torch_ps.OptimizerSpec("Adam"))


def test_name_of_a_connected_worker_is_taken(running: Pair) -> None:
    with (
        torch_ps.Client(str(running.servers), name="w0") as client,
        pytest.raises(torch_ps.NameTaken, match=r"'w0' is connected .*choose another name"),
    ):
        client.init(model(), SPEC)


def test_rank_of_another_worker_is_taken() -> None:
    with pair() as workers, torch_ps.Client(str(workers.servers), name="w2", rank=5) as third:
        third.init(model(), SPEC)
        with (
            raw(workers.servers.addresses[0]) as peer,
            pytest.raises(torch_ps.NameTaken, match="rank 5 belongs to worker 'w2'"),
        ):
            peer.join(pb.JoinRequest(worker="w3", rank=5, model=described(model())))


@pytest.mark.parametrize("name", ["", "x" * 101, "two\nlines"])
def test_bad_name_is_refused(peer: Raw, name: str) -> None:
    with pytest.raises(
        torch_ps.ProtocolError, match=r"JoinRequest\.worker is .*; it has to be printable text of 1 to 100"
    ):
        peer.join(pb.JoinRequest(worker=name, model=described(model())))


@pytest.mark.parametrize(
    ("request_model", "message"),
    [
        (pb.Model(optimizer="SGD"), "no trainable parameter"),
        (described({"x": torch.zeros(1, dtype=torch.complex64)}), "a dtype that cannot be served"),
        (pb.Model(optimizer="SGD", group=[pb.ParameterGroup(tensor=[NEGATIVE])]), "a negative size"),
    ],
)
def test_model_that_cannot_be_served_is_refused(peer: Raw, request_model: pb.Model, message: str) -> None:
    with pytest.raises(torch_ps.ProtocolError, match=message):
        peer.join(pb.JoinRequest(worker="w2", model=request_model))


# ------------------------------------------------------------------ pushing


def test_push_before_init_is_refused(running: Pair) -> None:
    with (
        torch_ps.Client(str(running.servers), name="w2") as client,
        pytest.raises(torch_ps.NotInitialised, match="'w2' cannot push before it has called init"),
    ):
        client.push({"x": X})


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({}, "gradient for tensor 'x'"),
        ({"x": X, "y": X}, "no tensor 'y'"),
        ({"x": torch.zeros(2, 4)}, r"'x' \[8\] float32 has the shape \[2, 4\]"),
    ],
)
def test_wrong_gradients_are_named_and_nothing_is_sent(
    running: Pair, gradients: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(torch_ps.ModelMismatch, match=message):
        running.workers[0].push(gradients)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_weight_that_is_no_number_of_samples_is_refused(running: Pair, weight: float) -> None:
    with pytest.raises(
        torch_ps.ProtocolError,
        match=r"worker 'w0': Push\.weight is .*; it has to be 0 or a number from",
    ):
        running.workers[0].push({"x": X}, weight=weight)


@pytest.mark.parametrize("ahead", [-1, 1])
def test_gradient_of_another_version_is_refused(running: Pair, ahead: int) -> None:
    with pytest.raises(torch_ps.StepConflict, match=f"has to be computed from version {running.steps}"):
        running.workers[0].push({"x": X}, base=running.steps + ahead)


def test_gradient_that_is_not_finite_is_left_out_and_counted(running: Pair) -> None:
    before = running.servers.status().nonfinite
    first, second = running.workers
    bad = torch.ones(SIZE)
    bad[3] = math.nan
    results = at_once(lambda: first.push({"x": bad}), lambda: second.push({"x": torch.ones(SIZE)}))
    running.steps += 1
    for result in results:
        assert result.params["x"].tolist() == [-running.steps] * SIZE  # the mean is the other one's ones
    assert running.servers.status().nonfinite == before + 1
    assert "gradient of worker w0" in running.servers.log
    assert "not finite in tensor 'x'" in running.servers.log


# ------------------------------------------------------------------ frames

NAN = pb.HyperValue(number=math.nan)


@pytest.mark.parametrize(
    ("header", "payload", "error", "message"),
    [
        ({"codec": "zip"}, bytes(4 * SIZE), torch_ps.UnknownCodec, "'zip' does not exist; choose one of none, fp16"),
        ({"codec": "none"}, bytes(4 * SIZE - 1), torch_ps.CorruptFrame, "none payload has 31 bytes; .* needs 32"),
        ({"codec": "none"}, bytes(4 * SIZE + 4), torch_ps.CorruptFrame, "none payload has 36 bytes; .* needs 32"),
        ({"codec": "none"}, b"", torch_ps.CorruptFrame, "none payload has 0 bytes"),
        ({"codec": "fp16"}, b"\0\0\xc0\x7f" + bytes(2 * SIZE), torch_ps.CorruptFrame, "scale nan"),
        ({"codec": "none", "bucket": 7}, bytes(4 * SIZE), torch_ps.CorruptFrame, "bucket 7 is not one of"),
        ({"hyper": {"lr": NAN}}, bytes(4 * SIZE), torch_ps.ProtocolError, "'lr' is nan; a finite number is needed"),
        ({"hyper": {"lr": pb.HyperValue(number=1e39)}}, bytes(4 * SIZE), torch_ps.ProtocolError, "at most 1e20"),
        ({"hyper": {"lr": pb.HyperValue(text="x")}}, bytes(4 * SIZE), torch_ps.ProtocolError, "lr is 'x'; .* a number"),
        (
            {"hyper": {"zeal": pb.HyperValue(number=1)}},
            bytes(4 * SIZE),
            torch_ps.ProtocolError,
            "no argument 'zeal'",
        ),
        ({"codec": "none", "step": 10**9}, bytes(4 * SIZE), torch_ps.StepConflict, "step 1000000000 .* is open"),
        ({"arena_bytes": 4 * SIZE}, b"1234", torch_ps.CorruptFrame, "bucket 0 in shared memory and has another one"),
    ],
)
def test_push_that_cannot_be_taken_is_refused(
    peer: Raw, header: dict[str, Any], payload: bytes, error: type[PsError], message: str
) -> None:
    push = pb.Push(**{"base": 0, "weight": 1.0, "codec": "none", **header})
    with peer.worker("v", model()) as hello_of_v:
        found = peer.exchange(hello_of_v, pack(pb.UpHeader(push=push), (payload,)))
    assert isinstance(found, error)
    assert re.search(message, str(found))


@pytest.mark.parametrize(
    ("header", "payload", "error", "message"),
    [
        ({"bucket": 7}, bytes(4 * SIZE), torch_ps.CorruptFrame, "bucket 7 is not one of"),
        ({}, bytes(4 * SIZE - 1), torch_ps.CorruptFrame, "none payload has 31 bytes; .* needs 32"),
        ({"ahead": 3}, b"", torch_ps.ProtocolError, "gradient 3 of bucket 0 has not been sent ahead"),
        ({"arena_bytes": 4 * SIZE}, b"", torch_ps.CorruptFrame, "names a gradient in shared memory and shares none"),
        (
            {"power": 0.0},
            bytes(4 * SIZE),
            torch_ps.ProtocolError,
            "'v': Measure.power is 0.0; it has to be a num",
        ),
        ({"power": math.nan}, bytes(4 * SIZE), torch_ps.ProtocolError, "Measure.power is nan"),
        ({"weight": math.inf}, bytes(4 * SIZE), torch_ps.ProtocolError, "worker 'v': Measure.weight is inf"),
        ({"step": 10**9}, bytes(4 * SIZE), torch_ps.StepConflict, "the norm of step 1000000000; step .* is open"),
        ({"missing": True}, bytes(4 * SIZE), torch_ps.CorruptFrame, "missing or elsewhere, and has another one in its"),
    ],
)
def test_question_for_a_norm_that_cannot_be_answered_is_refused(
    peer: Raw, header: dict[str, Any], payload: bytes, error: type[PsError], message: str
) -> None:
    measure = pb.Measure(**{"power": 2.0, "weight": 1.0, **header})
    with peer.worker("v", model()) as hello_of_v:
        found = peer.exchange(hello_of_v, pack(pb.UpHeader(measure=measure), (payload,)))
    assert type(found) is error
    assert re.search(message, str(found)), str(found)


PUSH = pack(pb.UpHeader(push=pb.Push(weight=1.0, codec="none")), (bytes(4 * SIZE),))


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (lambda peer: [b""], torch_ps.CorruptFrame, "expected field tag 0x0a at byte 0"),
        (lambda peer: [b"\x0a\x05ab"], torch_ps.CorruptFrame, "truncated: a field of 5 bytes starts at byte 2"),
        (lambda peer: [b"\x0a\x02\xff\xff"], torch_ps.CorruptFrame, "header of 2 bytes is not a UpHeader"),
        (lambda peer: [peer.hello(), PUSH[:-1]], torch_ps.CorruptFrame, f"truncated: a field of {4 * SIZE} bytes"),
        (lambda peer: [peer.hello(), PUSH + b"!"], torch_ps.CorruptFrame, "has 1 bytes after its payload"),
        (lambda peer: [peer.hello(), b"\x0a\xff\xff\xff\xff\xff\xff"], torch_ps.CorruptFrame, "unreadable length"),
        (lambda peer: [peer.hello(), bytes(MAX_MESSAGE_BYTES + 1)], torch_ps.CorruptFrame, "larger than max"),
        (lambda peer: [peer.hello(), PUSH], torch_ps.ProtocolError, "an observer cannot send push here"),
        (
            lambda peer: [peer.hello(), pack(pb.UpHeader(measure=pb.Measure(power=2.0)))],
            torch_ps.ProtocolError,
            "an observer cannot send measure here",
        ),
        (lambda peer: [peer.hello(), peer.hello()], torch_ps.ProtocolError, "an observer cannot send hello here"),
        (lambda peer: [peer.hello(), pack(pb.UpHeader())], torch_ps.ProtocolError, "an observer cannot send None here"),
        (lambda peer: [PUSH], torch_ps.CorruptFrame, "the first frame of an Exchange has to be Hello"),
        (
            lambda peer: [peer.hello("w0", 999)],
            torch_ps.UnknownWorker,
            "'w0' .session 999. is not in the roster; join again",
        ),
        (lambda peer: [peer.hello("nobody", 1)], torch_ps.UnknownWorker, "join again"),
        (lambda peer: [peer.hello(pull_codec="zip")], torch_ps.UnknownCodec, "'zip' does not exist"),
        (
            lambda peer: [peer.hello(), pack(pb.UpHeader(pull=pb.Pull(bucket=99)))],
            torch_ps.CorruptFrame,
            "bucket 99 is not one of",
        ),
        *[
            (
                lambda peer, header=header: [peer.hello(), pack(header, (b"1234",))],
                torch_ps.CorruptFrame,
                f"an observer sends a payload of 4 bytes with {header.WhichOneof('kind')}, which has none",
            )
            for header in (pb.UpHeader(pull=pb.Pull()), pb.UpHeader(renew=pb.Renew()))
        ],
    ],
)
def test_frame_that_breaks_the_contract_is_refused(
    peer: Raw, frames: Callable[[Raw], list[bytes]], error: type[PsError], message: str
) -> None:
    found = peer.exchange(*frames(peer))
    assert type(found) is error
    assert re.search(message, str(found)), str(found)


def test_seed_that_nobody_asked_for_is_refused(running: Pair, peer: Raw) -> None:
    who = running.workers[1]._session.identity
    header = pb.SeedHeader(worker=who.worker, session=who.session, secret=who.secret, model=described(model()))
    header.incarnation = peer.incarnation
    found = peer.error("Seed", [pack(header, (b"1234",))])
    assert "'w1': the frame with the model has a payload of 4 bytes" in str(found)
    found = peer.error("Seed", [pack(header)])
    assert isinstance(found, torch_ps.ProtocolError)
    assert "cannot seed shard 0: training has begun" in str(found)


# ------------------------------------------------------------------ the port


def test_random_bytes_on_the_port_disturb_nobody(running: Pair) -> None:
    target = address.parse(running.servers.addresses[0])
    for _ in range(20):
        with socket.create_connection(target, 10) as connection:
            connection.sendall(os.urandom(2000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not close


def test_half_open_connections_disturb_nobody(running: Pair) -> None:
    target = address.parse(running.servers.addresses[0])
    connections = [socket.create_connection(target, 10) for _ in range(50)]
    connections[0].sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    running.train()
    for connection in connections:
        connection.close()


def test_unknown_method_is_refused(peer: Raw) -> None:
    found = peer.error("Nothing", [b""])
    assert isinstance(found, torch_ps.Refused)
    assert "is a gRPC server but not one of torch-ps" in str(found)
