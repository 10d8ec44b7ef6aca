"""Limits on what peers choose, each asked for what is just beyond it."""

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.pair import SPEC, model
from torch_ps.common import optimizer_spec as optim
from torch_ps.common import schema
from torch_ps.common.errors import Overloaded, ProtocolError, Refused
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.observability.grpc_log import meaning
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.transport.limits import MAX_HOSTS, Rate, check_model


def described(*shape: int, groups: int = 1, optimizer: str = "SGD") -> Model:
    return Model(optimizer, tuple(Group((TensorSpec(f"t{number}", shape),), {"lr": 0.1}) for number in range(groups)))


def test_worker_beyond_max_workers_is_refused_and_one_that_comes_back_is_not() -> None:
    lead = Membership(quorum=1, lease=15.0, limit=2)
    for name in ("a", "b"):
        lead.join(name, None, 0.0, 0)
    before = lead.roster
    with pytest.raises(Overloaded, match="worker 'c' cannot join: the job has 2 workers, as many as --max-workers"):
        lead.join("c", None, 0.0, 0)
    assert lead.roster == before
    lead.join("b", None, 0.0, 0)


def test_join_beyond_max_workers_is_answered_when_a_place_is_free() -> None:
    with job(max_workers=1) as servers, torch_ps.Client(str(servers), name="w0") as first:
        first.init(model(), SPEC)
        with torch_ps.Client(str(servers), name="w1", timeout=1.0) as second, pytest.raises(torch_ps.Overloaded):
            second.init(model(), SPEC)
        first.close()
        with torch_ps.Client(str(servers), name="w1") as second:
            second.init(model(), SPEC)


def test_model_that_needs_more_than_max_model_is_refused_before_anything_is_built() -> None:
    with job(max_model=1e-6) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init(model(), SPEC)  # 8 elements, twice 4 bytes each
        with torch_ps.Client(str(servers), name="w1") as other, pytest.raises(torch_ps.Refused, match="--max-model"):
            other.init({"x": torch.zeros(1000)}, SPEC)


def test_model_is_weighed_with_the_state_of_its_optimizer() -> None:
    limits = {"num_shards": 2, "bucket_bytes": 4 << 20, "most_bytes": 1 << 20}
    check_model(described(1 << 18), **limits)
    check_model(described(1 << 17, optimizer="AdamW"), **limits)
    with pytest.raises(Refused, match=r"AdamW state would take up to 0.00 GiB on each of 2 shards"):
        check_model(described((1 << 17) + 1, optimizer="AdamW"), **limits)


def test_model_of_too_many_buckets_is_refused() -> None:
    with pytest.raises(Refused, match="131072 are the limit; raise --bucket-size"):
        check_model(described(1 << 26), num_shards=1, bucket_bytes=1024, most_bytes=1 << 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1] * 65}, "has 65 dimensions; the limit is 64"),
        ({"name": "x" * 1001}, "a tensor name has 1001 characters"),
        ({"shape": [1 << 41]}, "the limits are 100000 and 2"),
        ({"shape": [-1]}, "negative size"),
    ],
)
def test_tensor_beyond_a_limit_is_refused(change: dict[str, object], message: str) -> None:
    tensor = pb.TensorSpec(**{"name": "x", "shape": [1], "dtype": "float32", **change})  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=message):
        schema.from_proto(pb.Model(optimizer="SGD", group=[pb.ParameterGroup(tensor=[tensor])]))


def test_too_many_groups_are_refused() -> None:
    with pytest.raises(ProtocolError, match="in 10001 groups; the limits are 100000 and 10000"):
        schema.from_proto(pb.Model(optimizer="SGD", group=[pb.ParameterGroup()] * 10_001))


@pytest.mark.parametrize(
    "hyper",
    [
        {f"k{number}": pb.HyperValue(none=True) for number in range(65)},
        {"k" * 201: pb.HyperValue(none=True)},
        {"k": pb.HyperValue(text="x" * 201)},
        {"k": pb.HyperValue(numbers=pb.NumberList(value=[0.0] * 65))},
    ],
)
def test_hyperparameters_beyond_a_limit_are_refused(hyper: dict[str, pb.HyperValue]) -> None:
    with pytest.raises(ProtocolError, match="hyperparameter"):
        optim.hyper_from_proto(hyper)


def test_rate_lets_a_burst_through_and_then_so_many_a_second() -> None:
    rate = Rate(burst=3, per_second=2.0)
    for _ in range(3):
        rate.take("a", 10.0)
    with pytest.raises(Overloaded, match="a has joined 3 times in a row; 2 a second"):
        rate.take("a", 10.4)
    rate.take("b", 10.4)
    rate.take("a", 10.5)
    with pytest.raises(Overloaded):
        rate.take("a", 10.5)


def test_rate_remembers_a_bounded_number_of_hosts() -> None:
    rate = Rate(burst=1, per_second=1.0)
    for host in range(2 * MAX_HOSTS):
        rate.take(str(host), 0.0)
    assert len(rate._level) == MAX_HOSTS


def test_log_lines_beyond_a_number_are_counted_and_not_said() -> None:
    throttle = LogThrottle(lines=2, seconds=10.0)
    assert [throttle.admit(now) for now in (0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0)] == [0, 0, None, None, 2, 0, None]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            b"I1124 23:33:25.1 1 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
            b"error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired\n",
            "a TLS handshake failed: the peer's certificate has expired",
        ),
        (
            b"I1124 23:33:25.1 1 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
            b"error:10000070:SSL routines:OPENSSL_internal:BAD_PACKET_LENGTH\n",
            "a TLS handshake failed: the peer broke off: a client that does not trust this server's certificate does",
        ),
        (
            b"I1124 23:33:25.1 1 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
            b"error:10000070:SSL routines:OPENSSL_internal:NO_SHARED_CIPHER\n",
            "a TLS handshake failed: SSL routines:OPENSSL_internal:NO_SHARED_CIPHER",
        ),
        (
            b"E1130 17:00:00.1 1 hpack_parser.cc:999] Error parsing 'x\x1b' metadata: invalid value\n",
            "a peer has sent what is no call, and gRPC has refused it: Error parsing 'x\\x1b' metadata: invalid value",
        ),
        (b"terminate called after throwing\n", None),
    ],
)
def test_line_of_grpc_that_a_peer_has_caused_is_put_into_words(line: bytes, words: str | None) -> None:
    assert meaning(line) == words
