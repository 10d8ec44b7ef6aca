"""The sockets of a shard: who is let in, what goes over them, and how a stream on them ends."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.certificates import Authority, options
from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.proxy import Proxy
from tests.support.raw import secret_of
from tests.support.threads import at_once
from torch_ps.common.codecs.registry import codec
from torch_ps.common.errors import NoSharedMemory, PsError, UnknownWorker
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.tls_socket import Contexts
from torch_ps.common.wire import address, port_proof
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import Frame, Split, pack, split, unpack
from torch_ps.common.wire.socket_frames import PREFIX, TOKEN_BYTES, lengths_of
from torch_ps.common.wire.socket_frames import put as buffers_of
from torch_ps.common.wire.striped_socket import StripedSocket
from torch_ps.ps.transport.bundles import Bundles
from torch_ps.ps.transport.carrier import Carrier
from torch_ps.ps.transport.socket_carrier import SocketCarrier
from torch_ps.ps.transport.socket_listeners import MAX_WAITING
from torch_ps.ps.transport.streams import Stream
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.server_sockets import NoDataPort, connect_data, connect_unix
from torch_ps.worker.transport.socket_stream import SocketStream

SGD = torch_ps.OptimizerSpec("SGD", lr=1.0)


def put(message: bytes) -> bytes:
    return b"".join(buffers_of(message))


def offer_of(servers: Servers) -> pb.SocketOffer:
    return servers.described().socket


def hello(servers: Servers, worker: str = "", session: int = 0) -> bytes:
    """First frame of a stream; without a worker, of an observer."""
    hello = pb.Hello(worker=worker, session=session, incarnation=servers.described().incarnation)
    hello.secret = secret_of(worker)
    return pack(pb.UpHeader(hello=hello))


@contextlib.contextmanager
def opened(offer: pb.SocketOffer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SECONDS)
        connection.connect("\0" + offer.name)
        yield connection


def end_of(connection: socket.socket) -> pb.StreamEnd:
    """The message that ends a stream; everything before it is skipped."""
    with connection.makefile("rb") as incoming:
        while True:
            length, rest, end = lengths_of(incoming.read(PREFIX.size))
            message = incoming.read(length)
            incoming.read(rest)
            if end:
                return pb.StreamEnd.FromString(message)


def test_exchange_of_workers_on_this_host_goes_over_the_socket_and_not_over_grpc() -> None:
    with job() as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.ones(2)}, SGD)
        client.push({"x": torch.ones(2)})
        listening = offer_of(servers).name
        with open("/proc/net/unix", encoding="ascii") as sockets:
            connected = [line for line in sockets if line.rstrip().endswith(f"@{listening}") and " 0001 03 " in line]
        assert len(connected) == 1
        assert torch.equal(client.pull().params["x"], torch.zeros(2))


def test_wrong_token_is_let_go_and_costs_nobody_anything() -> None:
    with job() as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.ones(2)}, SGD)
        with opened(offer_of(servers)) as stranger:
            stranger.sendall(bytes(TOKEN_BYTES) + put(b"anything"))
            with contextlib.suppress(ConnectionError):
                assert not stranger.recv(1)
        assert client.push({"x": torch.ones(2)}).version == 1


def test_silent_connections_do_not_keep_a_worker_out() -> None:
    with job() as servers, contextlib.ExitStack() as stack:
        offer = offer_of(servers)
        silent = [stack.enter_context(opened(offer)) for _ in range(MAX_WAITING)]
        with torch_ps.Client(str(servers), name="w0") as client:
            client.init({"x": torch.ones(2)}, SGD)
            assert silent[0].recv(1) == b""
            silent[1].setblocking(False)
            with pytest.raises(BlockingIOError):
                silent[1].recv(1)
            assert client.push({"x": torch.ones(2)}).version == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_is_let_go_without_waiting_for_a_token() -> None:
    with job() as servers:
        offer = offer_of(servers)
        os.seteuid(65534)
        try:
            with opened(offer) as stranger:
                assert stranger.recv(1) == b""
        finally:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("bytes_sent", "error", "text"),
    [
        (put(b"\xff\xff"), "CorruptFrame", "expected field tag"),
        (PREFIX.pack(1 << 30, 0), "CorruptFrame", "a message of 1073741824 bytes; at most 5242880 are allowed"),
        (put(pack(pb.UpHeader(renew=pb.Renew()))), "CorruptFrame", "the first frame of an Exchange has to be Hello"),
        (put(pack(pb.UpHeader(hello=pb.Hello(worker="w9", session=9, incarnation=9)))), "Restarted", "w9"),
    ],
)
def test_stream_that_is_refused_says_why_and_costs_nobody_anything(bytes_sent: bytes, error: str, text: str) -> None:
    with job() as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.ones(2)}, SGD)
        offer = offer_of(servers)
        with opened(offer) as stranger:
            stranger.sendall(offer.token + bytes_sent)
            end = end_of(stranger)
        assert end.error == error
        assert text in end.text
        assert client.push({"x": torch.ones(2)}).version == 1


def test_error_of_a_stream_comes_out_as_its_class() -> None:
    ends: list[PsError] = []
    with job() as servers:
        offer = offer_of(servers)
        where = address.parse(servers.addresses[0])
        stream = SocketStream(connect_unix(offer), where, lambda message: True, ends.append)
        stream.send(hello(servers, "w9", 9))
        until(lambda: bool(ends), "the stream ends")
        stream.close()
    assert isinstance(ends[0], torch_ps.UnknownWorker)
    assert "w9" in str(ends[0])


def test_large_frames_come_over_the_socket_whole() -> None:
    """Payloads travel over it while a bucket's place in shared memory is taken, and to observers always."""
    size = 700_000
    with job(bucket_size=2.0) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.arange(float(size))}, SGD)
        received: list[torch.Tensor] = []
        ends: list[PsError] = []

        def take(message: Frame) -> bool:
            header, payload = unpack(message, pb.DownHeader)
            assert header.codec == "none"
            received.append(torch.frombuffer(bytearray(payload), dtype=torch.float32))
            return True

        stream = SocketStream(connect_unix(offer_of(servers)), address.parse(servers.addresses[0]), take, ends.append)
        stream.send(hello(servers))
        for bucket in range(2):
            stream.send(pack(pb.UpHeader(pull=pb.Pull(bucket=bucket))))
        until(lambda: len(received) == 2 or bool(ends), "both buckets are here")
        assert not ends
        stream.close()
    assert torch.equal(torch.cat(received), torch.arange(float(size)))


@pytest.mark.parametrize(
    "wrong", [{"name": ""}, {"host": "another"}, {"name": "torch-ps-that-is-not-there"}], ids=lambda wrong: str(wrong)
)
def test_socket_that_cannot_be_reached_is_no_error_but_a_reason(wrong: dict[str, Any]) -> None:
    with job() as servers:
        offer = offer_of(servers)
        for field, value in wrong.items():
            setattr(offer, field, value)
        with pytest.raises(NoSharedMemory, match=r"another host|cannot be reached"):
            connect_unix(offer)


def test_worker_goes_on_over_grpc_where_the_socket_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(offer: pb.SocketOffer) -> socket.socket:
        raise NoSharedMemory("its socket cannot be reached: gone")

    monkeypatch.setattr("torch_ps.worker.transport.link.connect_unix", gone)
    with job() as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.ones(2)}, SGD)
        assert client.push({"x": torch.ones(2)}).version == 1


def test_killed_server_ends_the_stream_at_once() -> None:
    ends: list[PsError] = []
    with contextlib.suppress(AssertionError), job() as servers:
        stream = SocketStream(
            connect_unix(offer_of(servers)), address.parse(servers.addresses[0]), lambda message: True, ends.append
        )
        os.kill(servers.processes[0].pid, signal.SIGKILL)
        until(lambda: bool(ends), "the stream ends")
        stream.close()
    assert isinstance(ends[0], torch_ps.Unreachable)


def test_server_that_has_stopped_has_no_socket() -> None:
    def listening(name: str) -> bool:
        with open("/proc/net/unix") as table:
            return f"@{name}" in table.read()

    with job() as servers:
        name = offer_of(servers).name
        assert listening(name)
    assert not listening(name)


# -------------------------------------------------------------- the data port


def carrier_of(servers: Servers) -> tuple[str, str]:
    """Kind of the carrier of the one worker, and why it is not a faster one, as the server tells."""
    link = Link(address.parse(servers.addresses[0]))
    try:
        (worker,) = link.status(SECONDS).worker
    finally:
        link.close()
    return worker.carrier, worker.carrier_reason


@contextlib.contextmanager
def dialled(offer: pb.DataPortOffer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", offer.port), SECONDS) as connection:
        yield connection


@pytest.mark.parametrize(
    ("plane", "data_port", "carrier", "reason"),
    [
        ("network", "0", "socket", ""),
        ("grpc", "0", "gRPC", "plane is grpc"),
        ("network", "off", "gRPC", "the server has no data port"),
    ],
)
def test_network_takes_the_data_port_if_there_is_one(plane: str, data_port: str, carrier: str, reason: str) -> None:
    with job(data_port=data_port) as servers, torch_ps.Client(str(servers), name="w0", plane=plane) as client:
        client.init({"x": torch.ones(2)}, SGD)
        assert torch.equal(client.push({"x": torch.ones(2)}).params["x"], torch.zeros(2))
        assert carrier_of(servers) == (carrier, reason)


def test_proxy_in_between_carries_everything_over_grpc() -> None:
    with job() as servers, Proxy(servers.addresses[0]) as proxy:
        with torch_ps.Client(proxy.address, name="w0", plane="network") as client:
            client.init({"x": torch.ones(2)}, SGD)
            client.push({"x": torch.ones(2)})
            carrier, reason = carrier_of(servers)
        assert carrier == "gRPC"
        assert reason.endswith("so something stands between")


def test_strangers_at_the_data_port_are_let_go_and_cost_nobody_anything() -> None:
    with job() as servers, torch_ps.Client(str(servers), name="w0", plane="network") as client:
        client.init({"x": torch.ones(2)}, SGD)
        offer = servers.described().data_port
        greeting = port_proof.greet()
        with dialled(offer) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
        with dialled(offer) as stranger:
            stranger.sendall(greeting)
            assert len(stranger.recv(port_proof.ANSWER_BYTES, socket.MSG_WAITALL)) == port_proof.ANSWER_BYTES
            stranger.sendall(bytes(32))
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
        assert client.push({"x": torch.ones(2)}).version == 1


def test_silent_connections_to_the_data_port_do_not_keep_a_worker_out() -> None:
    with job() as servers, contextlib.ExitStack() as stack:
        offer = servers.described().data_port
        silent = [stack.enter_context(dialled(offer)) for _ in range(MAX_WAITING)]
        with torch_ps.Client(str(servers), name="w0", plane="network") as client:
            client.init({"x": torch.ones(2)}, SGD)
            assert silent[0].recv(1) == b""
            assert client.push({"x": torch.ones(2)}).version == 1
            assert carrier_of(servers)[0] == "socket"


def test_worker_never_speaks_to_another_server_at_the_data_port() -> None:
    with job() as servers, job() as others:
        ours, other = servers.described().data_port, others.described().data_port
        where = address.parse(servers.addresses[0])
        ours.port = other.port
        with pytest.raises(NoDataPort, match="is another server"):
            connect_data(where, ours)
        ours.port = address.parse(others.addresses[0]).port  # of gRPC
        with pytest.raises(NoDataPort, match=r"is another server|does not answer"):
            connect_data(where, ours)


def test_data_ports_that_drop_what_comes_are_given_up_at_once_and_grpc_carries_the_frames(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch_ps.worker.transport.server_sockets.DATA_SECONDS", 0.2)
    dialling = threading.Barrier(2)
    with socket.create_server(("127.0.0.1", 0)) as silent, job(shards=2) as servers:  # takes, and answers nothing

        def elsewhere(server: Address, offer: pb.DataPortOffer, contexts: None, connections: int) -> Any:
            dialling.wait(SECONDS)  # no shard is dialled after another one was given up
            return connect_data(
                server, pb.DataPortOffer(port=silent.getsockname()[1], token=offer.token, server_port=offer.server_port)
            )

        monkeypatch.setattr("torch_ps.worker.transport.link.connect_data", elsewhere)
        with torch_ps.Client(str(servers), name="w0", plane="network") as client:
            client.init({"x": torch.ones(2)}, SGD)
            assert client.push({"x": torch.ones(2)}).version == 1
            assert carrier_of(servers)[0] == "gRPC"
            assert "does not answer within 0.2 s" in carrier_of(servers)[1]
    assert caplog.text.count("gRPC, which is slower, carries all frames") == 2


def test_resolver_that_hangs_costs_a_worker_the_time_of_a_data_port_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch_ps.worker.transport.server_sockets.DATA_SECONDS", 0.2)
    answers, look_up = threading.Event(), socket.getaddrinfo

    def hangs(host: str, port: int, **named: Any) -> list[Any]:
        if not named.get("flags", 0) & socket.AI_NUMERICHOST:
            answers.wait(SECONDS)
        return look_up(host, port, **named)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with pytest.raises(NoDataPort, match=r"the name localhost is not looked up within 0\.2 s"):
        connect_data(Address("localhost", 9), pb.DataPortOffer(port=9, server_port=9))
    answers.set()


def test_values_come_over_the_data_port_while_the_parameters_change() -> None:
    """Async: what is answered leaves as it was, though another worker's push changes the parameters meanwhile."""
    size = 1_000_000  # one bucket
    with job(mode="async") as servers, contextlib.ExitStack() as stack:
        one, two = (
            stack.enter_context(torch_ps.Client(str(servers), name=name, plane="network")) for name in ("w0", "w1")
        )
        one.init({"x": torch.zeros(size)}, SGD)
        two.init({"x": torch.zeros(size)}, SGD)

        def push(client: torch_ps.Client) -> list[torch.Tensor]:
            return [client.push({"x": torch.ones(size)}).params["x"] for _ in range(5)]

        for found in at_once(lambda: push(one), lambda: push(two)):
            for values in found:
                assert values.min() == values.max()
        assert torch.equal(one.pull().params["x"], torch.full((size,), -10.0))


def test_three_connections_give_the_bits_of_one_and_are_reported() -> None:
    found = []
    for connections in (1, 3):
        with (
            job(bucket_size=1.0) as servers,
            torch_ps.Client(str(servers), name="w0", plane="network", connections=connections) as client,
        ):
            generator = torch.Generator().manual_seed(1)
            client.init({"x": torch.randn(700_000, generator=generator)}, SGD)
            for _ in range(3):
                values = client.push({"x": torch.randn(700_000, generator=generator)}).params["x"]
            found.append(values)
            assert carrier_of(servers) == ("socket" if connections == 1 else "3 sockets", "")
    assert torch.equal(*found)


def test_push_that_one_killed_connection_of_three_cuts_off_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is killed between its blocks, so that the stream ends in the middle of a push."""
    opened, killed = list[Any](), list[bool]()
    send = StripedSocket.sendmsg

    def kill_the_second(end: StripedSocket, buffers: Sequence[memoryview], *rest: Any) -> int:
        if end in opened[:1] and not killed and end.writing_fileno() != end.fileno():
            killed.append(True)
            end._connections[1].shutdown(socket.SHUT_RDWR)
        return send(end, buffers, *rest)

    def connect(*arguments: Any) -> Any:
        opened.append(connection := connect_data(*arguments))
        return connection

    monkeypatch.setattr("torch_ps.worker.transport.link.connect_data", connect)
    size = 700_000
    with job() as servers, torch_ps.Client(str(servers), name="w0", plane="network", connections=3) as client:
        client.init({"x": torch.zeros(size)}, SGD)
        client.push({"x": torch.ones(size)})
        monkeypatch.setattr(StripedSocket, "sendmsg", kill_the_second)
        for step in range(2, 4):
            pushed = client.push({"x": torch.ones(size)})
            assert pushed.version == step
            assert torch.equal(pushed.params["x"], torch.full((size,), -float(step)))
        assert killed
        assert len(opened) == 2


def test_connection_whose_place_in_a_stream_is_taken_or_does_not_exist_is_let_go() -> None:
    with job() as servers, contextlib.ExitStack() as stack:
        offer = servers.described().data_port
        group = port_proof.places(3)

        def prove(place: port_proof.Place) -> socket.socket:
            connection = stack.enter_context(dialled(offer))
            connection.sendall(greeting := port_proof.greet(place))
            answered = connection.recv(port_proof.ANSWER_BYTES, socket.MSG_WAITALL)
            connection.sendall(port_proof.prove(offer.token, greeting, answered) or b"")
            return connection

        first = prove(group[0])
        for wrong in (group[0], port_proof.Place(group[0].group, 1, 2)):
            assert prove(wrong).recv(1) == b""
        with torch_ps.Client(str(servers), name="w0", plane="network", connections=2) as client:
            client.init({"x": torch.ones(2)}, SGD)
            assert client.push({"x": torch.ones(2)}).version == 1
        first.setblocking(False)
        with pytest.raises(BlockingIOError):  # it waits for the two others
            first.recv(1)


def test_connections_of_a_stream_that_do_not_come_together_or_send_too_early_are_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch_ps.ps.transport.bundles.SECONDS", 0.1)

    async def served() -> None:
        async def exchange(carrier: Carrier) -> None:
            raise AssertionError("a stream has begun")

        bundles, places = Bundles(exchange), port_proof.places(3)
        ends = [socket.socketpair() for _ in places]
        carriers = [SocketCarrier(ours, "peer", "socket") for ours, _ in ends]
        await asyncio.gather(*map(bundles.serve, carriers[:2], places[:2]))
        monkeypatch.setattr("torch_ps.ps.transport.bundles.SECONDS", SECONDS)
        ends[0][1].send(b"proof and more")
        assert await carriers[0].receive_bytes(5) == b"proof"
        await asyncio.gather(*map(bundles.serve, carriers, places))
        for carrier, (_, theirs) in zip(carriers, ends, strict=True):
            carrier.dispose()
            theirs.close()

    asyncio.run(asyncio.wait_for(served(), SECONDS))


def test_split_frame_with_two_headers_is_refused() -> None:
    ends: list[PsError] = []
    with job() as servers:
        where = address.parse(servers.addresses[0])
        stream = SocketStream(
            connect_data(where, servers.described().data_port), where, lambda message: True, ends.append
        )
        frame = split(pb.UpHeader(push=pb.Push(weight=1.0, codec="none")), [bytes(8)])
        assert isinstance(frame, Split)
        stream.send(Split(hello(servers) + frame.head, frame.payload))
        until(lambda: bool(ends), "the stream ends")
        stream.close()
    assert "are not one header" in str(ends[0])


@pytest.mark.parametrize("mutual", [True, False], ids=["mutual TLS", "TLS"])
def test_data_port_speaks_the_tls_of_the_job(tmp_path: Path, mutual: bool) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server", mutual=mutual)
    worker = authority.issue("worker") if mutual else Tls(ca=authority.ca)
    size = 300_000
    with (
        job(**options(server)) as servers,
        torch_ps.Client(str(servers), name="w0", plane="network", connections=2 if mutual else 1, tls=worker) as client,
    ):
        client.init({"x": torch.zeros(size)}, SGD)
        for _ in range(3):
            values = client.push({"x": torch.arange(float(size))}).params["x"]
        assert torch.equal(values, -3 * torch.arange(float(size)))
        link = Link(address.parse(servers.addresses[0]), Access(worker))
        offer = link.describe(SECONDS).data_port
        assert [each.carrier for each in link.status(SECONDS).worker] == ["2 sockets" if mutual else "socket"]
        link.close()
        _strangers_are_kept_out(servers, offer, tmp_path, asks_for_certificates=mutual)
        assert client.push({"x": torch.zeros(size)}).version == 4


def _strangers_are_kept_out(
    servers: Servers, offer: pb.DataPortOffer, folder: Path, *, asks_for_certificates: bool
) -> None:
    where, authority = address.parse(servers.addresses[0]), Path(folder, "authority.pem")
    other = Authority(folder, "another")
    with pytest.raises(NoDataPort, match="one of its two ports speaks TLS"):
        connect_data(where, offer)
    with pytest.raises(NoDataPort, match="cannot be reached"):  # its certificate is of another authority
        connect_data(where, offer, Contexts(Tls(ca=other.ca), server=False))
    if asks_for_certificates:
        with pytest.raises(NoDataPort):
            connect_data(where, offer, Contexts(Tls(ca=str(authority)), server=False))
    with dialled(offer) as stranger:
        stranger.sendall(port_proof.greet())
        with contextlib.suppress(ConnectionError):
            while stranger.recv(1 << 10):  # an alert of TLS, and no more
                pass


def test_certificate_that_was_renewed_is_shown_on_the_next_connection(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server", mutual=False)
    contexts = Contexts(Tls(cert=server.cert, key=server.key), server=True)
    before = contexts.current()
    assert contexts.current() is before
    authority.issue("server", mutual=False)
    until(lambda: contexts.current() is not before, "the new files are read")


def test_killed_server_ends_the_stream_on_its_data_port_at_once() -> None:
    ends: list[PsError] = []
    with contextlib.suppress(AssertionError), job() as servers:
        where = address.parse(servers.addresses[0])
        stream = SocketStream(
            connect_data(where, servers.described().data_port), where, lambda message: True, ends.append
        )
        os.kill(servers.processes[0].pid, signal.SIGKILL)
        until(lambda: bool(ends), "the stream ends")
        stream.close()
    assert isinstance(ends[0], torch_ps.Unreachable)


def test_frames_behind_the_error_that_ends_a_stream_do_not_keep_the_server_busy() -> None:
    stuck: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        stuck.append(number)
        raise AssertionError("the event loop stands still")

    async def ends() -> None:
        ours, theirs = socket.socketpair()
        carrier = SocketCarrier(ours, "peer", "Unix socket")
        stream = Stream(worker="w0", session=1, codec=codec("none"))
        carried = asyncio.create_task(carrier.carry(stream, lambda _: None))
        await asyncio.sleep(0)
        stream.outbox.put_nowait(UnknownWorker("no sign of life"))
        stream.outbox.put_nowait(pack(pb.DownHeader()))  # as the roster that changes when another one is dropped
        with pytest.raises(UnknownWorker):
            await carried
        carrier.dispose()
        theirs.close()

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(5)
    try:
        asyncio.run(ends())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not stuck
