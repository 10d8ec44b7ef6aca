"""What a shard tells about itself: gRPC health, /metrics, Status. All of it agrees with what was pushed."""

import contextlib
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.quadratic import quadratics, round_robin
from torch_ps.common.rpc import channel
from torch_ps.common.wire.address import Address, parse
from torch_ps.ps.observability.http import MAX_CLIENTS_OF_HOST, SECONDS, HttpServer
from torch_ps.ps.observability.loop_health import LoopHealth

STEPS, SIZE = 11, 3


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """A job of two asynchronous workers in turn, after ``STEPS`` pushes; on two shards, of which one has the model."""
    with job(mode="async", workers=2, shards=2) as servers, quadratics(servers, 2, [0.1] * SIZE) as workers:
        round_robin(workers, STEPS)
        with torch_ps.Client(str(servers), name="w0") as again, pytest.raises(torch_ps.NameTaken):
            again.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD"))
        yield servers


def metrics(servers: Servers, shard: int) -> dict[str, float]:
    """Sample name (with the labels' values) -> value."""
    with urllib.request.urlopen(f"http://{servers.metrics[shard]}/metrics", timeout=30) as page:
        text = page.read().decode()
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("service", ["", channel.SERVICE])
def test_health_service_of_every_shard_says_serving(servers: Servers, shard: int, service: str) -> None:
    with grpc.insecure_channel(servers.addresses[shard]) as connection:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = health_pb2_grpc.HealthStub(connection).Check(request, timeout=30)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("shard", [0, 1])
def test_health_page_of_every_shard_says_serving(servers: Servers, shard: int) -> None:
    with urllib.request.urlopen(f"http://{servers.metrics[shard]}/health", timeout=30) as page:
        assert (page.status, page.read()) == (200, b"serving\n")


def test_health_page_says_why_a_shard_does_not_work() -> None:
    health = LoopHealth()
    assert health.problem(time.monotonic()) == ""
    server = HttpServer(Address("127.0.0.1", 0), CollectorRegistry(), lambda: health.problem(time.monotonic() + 60))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{server.address}/health", timeout=30)
    assert caught.value.code == 503
    assert b"the event loop has not run for 60 s" in caught.value.read()
    caught.value.close()
    server.close()


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"])
def test_visitors_who_are_silent_or_slow_or_do_not_read_do_not_keep_others_out(servers: Servers, sent: bytes) -> None:
    where = parse(servers.metrics[0])
    with contextlib.ExitStack() as stack:
        for _ in range(2 * MAX_CLIENTS_OF_HOST):
            stack.enter_context(socket.create_connection(where, 10)).sendall(sent)
        with urllib.request.urlopen(f"http://{where}/health", timeout=SECONDS / 2) as page:
            assert page.read() == b"serving\n"


def test_oldest_visitor_of_a_host_with_too_many_is_ended(servers: Servers) -> None:
    where = parse(servers.metrics[0])
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(socket.create_connection(where, 10)) for _ in range(MAX_CLIENTS_OF_HOST + 1)]
        visitors[-1].sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert b"200 OK" in visitors[-1].recv(4096)
        late = stack.enter_context(socket.create_connection(where, 10))
        late.sendall(b"G")
        assert visitors[0].recv(1) == b""


def answer(servers: Servers, request: bytes) -> bytes:
    with socket.create_connection(parse(servers.metrics[0]), 10) as visitor:
        visitor.sendall(request)
        return b"".join(iter(lambda: visitor.recv(4096), b""))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"HEAD /health HTTP/1.1\r\n\r\n", b"200 OK"),
        (b"GET /health?now HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"\x16\x03\x01\r\n\r\n", b"400 Bad Request"),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 2000, b"431 Request Header Fields Too Large"),
    ],
)
def test_every_request_gets_its_status(servers: Servers, request_: bytes, status: bytes) -> None:
    found = answer(servers, request_)
    assert found.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert found.endswith(b"\r\n\r\n") == request_.startswith(b"HEAD")


def test_page_of_metrics_is_not_written_anew_for_every_visitor() -> None:
    written: list[None] = []
    server = HttpServer(Address("127.0.0.1", 0), CollectorRegistry(), lambda: "", lambda: written.append(None))
    server._page_until = time.monotonic() + 60
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=30) as page:
        assert page.status == 200
    assert not written
    server.close()


def test_counters_agree_with_what_was_pushed(servers: Servers) -> None:
    found = metrics(servers, 0)
    assert found["ps_bucket_steps_total"] == STEPS
    assert found["ps_version"] == STEPS
    assert found["ps_pushed_bytes_total"] == STEPS * SIZE * 4
    assert (
        found["ps_pulled_bytes_total"] == (STEPS + 2) * SIZE * 4
    )  # each push is answered; both workers began by a pull
    assert found["ps_staleness_versions_count"] == STEPS
    assert found["ps_staleness_versions_sum"] == STEPS - 1  # the first push alone is fresh
    assert found["ps_roster_workers"] == found["ps_connected_workers"] == 2
    assert found["ps_refused_calls_total NameTaken"] == 1
    assert found["ps_nonfinite_gradients_total"] == found["ps_late_pushes_total"] == 0


def test_shard_without_a_part_of_the_model_counts_nothing(servers: Servers) -> None:
    found = metrics(servers, 1)
    assert found["ps_bucket_steps_total"] == found["ps_pushed_bytes_total"] == 0
    assert found["ps_roster_workers"] == 2


def test_status_agrees_with_what_was_pushed(servers: Servers) -> None:
    status = servers.status()
    assert (status.mode, status.initialised, status.open) == ("async", True, True)
    assert (status.version, status.num_buckets, status.num_parameters) == (STEPS, 1, SIZE)
    assert dict(status.staleness) == {0: 1, 1: STEPS - 1}
    assert [(w.worker, w.rank, w.clock, w.connected) for w in status.worker] == [
        ("w0", 0, (STEPS + 1) // 2, True),
        ("w1", 1, STEPS // 2, True),
    ]
    assert sum(w.bytes_pushed for w in status.worker) == STEPS * SIZE * 4
