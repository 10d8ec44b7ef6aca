"""TLS and tokens on real servers: admitted clients train, every other one is refused with a reason, the job goes on."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message

import torch_ps
from tests.support.certificates import Authority, options, write
from tests.support.jobs import Servers, job, until
from tests.support.pair import SPEC, Pair, model, pair
from tests.support.proxy import Proxy
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access, port_credentials
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.token import TokenFile
from torch_ps.common.wire.address import parse
from torch_ps.worker.transport.link import Link

TOKEN = "a-secret-of-the-job-0123456789"


@pytest.fixture(autouse=True)
def _messages_are_ours(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Lines of gRPC itself about a handshake, with a place in its source, do not come between."""
    yield
    assert ".cc:" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder, "stranger")


@pytest.fixture(scope="module")
def token(folder: Path) -> str:
    path = folder / "token"
    path.write_text(f"{TOKEN}\n")
    return str(path)


@pytest.fixture(scope="module")
def mutual(authority: Authority, token: str) -> Iterator[Pair]:
    """Two workers with certificates and the token, on two shards that ask for both, from each other too."""
    server, worker = authority.issue("server"), authority.issue("worker")
    with pair(shards=2, tls=worker, token_file=token, clip_norm=1e6, **options(server)) as found:
        yield found


def refusal(server: str, tls: Tls | str | None = None, token_file: str | None = None) -> torch_ps.PsError:
    """Error with which a server refuses a client that must not get in."""
    with pytest.raises(torch_ps.PsError) as caught, torch_ps.Client(server, name="x", tls=tls, token_file=token_file):
        pass
    return caught.value


# ------------------------------------------------------------------ who belongs


def test_workers_and_shards_with_certificates_and_token_train(mutual: Pair) -> None:
    mutual.train()
    assert mutual.servers.status().version == mutual.steps
    assert "mutual TLS, with token" in mutual.servers.log


def test_servers_without_tls_ca_ask_clients_for_no_certificate(authority: Authority) -> None:
    chain = authority.issue("chained", mutual=False)
    write(Path(chain.cert), Path(chain.cert).read_bytes() + authority.path.read_bytes())  # so that shard 1 believes 0
    with pair(shards=2, tls=Tls(ca=authority.ca), clip_norm=1e6, **options(chain)) as found:
        found.train()
        assert ", TLS, without token" in found.servers.log


def test_optimizer_over_tls_with_the_token_trains_as_without_a_server(
    authority: Authority, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, trained = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    trained.load_state_dict(plain.state_dict())
    tls, x = authority.issue("server"), torch.tensor([[1.0, 2.0]])
    monkeypatch.setenv("PS_TOKEN_FILE", token)  # as ps-worker does for a script
    with job(token_file=token, **options(tls)) as servers:
        local = torch.optim.SGD(plain.parameters(), lr=0.1)
        wrapped = torch.optim.SGD(trained.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(wrapped, trained, str(servers), tls=tls) as optimizer:
            for each, net in ((local, plain), (optimizer, trained)):
                for _ in range(3):
                    each.zero_grad()
                    net(x).square().sum().backward()
                    each.step()
    assert torch.equal(plain.weight, trained.weight)


# ------------------------------------------------------------------ who does not

Files = Callable[[Authority, Authority], Tls | str | None]
NO_TLS: Files = lambda authority, stranger: None  # noqa: E731


@pytest.mark.parametrize(
    ("files", "message", "logged"),
    [
        (NO_TLS, "speaks TLS only and this process speaks in the clear", "the peer does not speak TLS"),
        (
            lambda authority, stranger: Tls(stranger.ca, *pair_of(authority.issue("worker"))),
            "certificate of server .* is not of an authority of tls_ca .*stranger.pem: wrong tls_ca here",
            None,  # the client ends the connection without a word
        ),
        (
            lambda authority, stranger: authority.ca,
            "wants a certificate of its clients; give tls_cert and tls_key",
            "the client showed no certificate",
        ),
        (
            lambda authority, stranger: authority.issue("late", days=-1),
            "refuses the certificate .*late.cert.pem: certificate has expired",
            "the peer's certificate has expired",
        ),
        (
            lambda authority, stranger: Tls(authority.ca, *pair_of(stranger.issue("forged"))),
            "refuses the certificate .*forged.cert.pem: unable to get local issuer certificate",
            "the peer's certificate is not of an authority in tls_ca",
        ),
    ],
    ids=["plain client", "wrong CA", "no certificate", "expired certificate", "certificate of a stranger"],
)
def test_client_that_does_not_fit_is_told_why_and_the_job_goes_on(
    mutual: Pair, authority: Authority, stranger: Authority, token: str, files: Files, message: str, logged: str | None
) -> None:
    error = refusal(mutual.servers.addresses[0], files(authority, stranger), token)
    assert isinstance(error, torch_ps.Refused)
    assert re.search(message, str(error)), str(error)
    mutual.train()
    assert ".cc:" not in mutual.servers.log
    if logged is not None:
        assert f"warning: a TLS handshake failed: {logged}" in mutual.servers.processes[0].output


def pair_of(tls: Tls) -> tuple[str, str]:
    return tls.cert, tls.key


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "wants a token and none was shown"), ("b" * 30, "the token that was shown is not this job's")],
    ids=["no token", "wrong token"],
)
def test_client_without_the_token_is_told_which_and_the_job_goes_on(
    mutual: Pair, authority: Authority, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "token"
    path.write_text(content or "")
    error = refusal(mutual.servers.addresses[0], authority.issue("worker"), str(path) if content else None)
    assert isinstance(error, torch_ps.Unauthenticated)
    assert message in str(error)
    mutual.train()
    log = mutual.servers.processes[0].output
    assert re.search(f"warning: refused /torch_ps.v1.ParameterServer/Describe of ipv4:127.0.0.1.*{message}", log)
    assert "b" * 30 not in log
    assert TOKEN not in log


def test_server_that_refuses_a_sign_of_life_for_its_token_is_alive(tmp_path: Path) -> None:
    """A worker whose token is out of date keeps the connection that it has."""
    for name in ("right", "old"):
        (tmp_path / name).write_text(f"a-secret-of-the-job-{name}-0123456789")
    with job(token_file=str(tmp_path / "right")) as servers:
        link = Link(parse(str(servers)), Access(None, TokenFile(str(tmp_path / "old"))))
        long_ago = time.monotonic() - 60.0
        assert link.renew(pb.RenewRequest(), long_ago, 1.0) > long_ago
        servers.processes[0].end()
        with pytest.raises(torch_ps.Unreachable, match="no sign of life of"):
            link.renew(pb.RenewRequest(), long_ago, 1.0)
        link.close()


def test_tls_client_of_a_plain_server_is_told_why(authority: Authority) -> None:
    with pair() as running:
        error = refusal(running.servers.addresses[0], authority.ca)
        assert isinstance(error, torch_ps.Refused)
        assert "does not speak TLS; start it with tls_cert and tls_key, or leave TLS out here" in str(error)
        running.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"days": -1}, "the certificate of server .* has expired; it has to be renewed there"),
        ({"names": ("elsewhere",)}, "the certificate of server .* is for another name than 127.0.0.1"),
    ],
    ids=["expired", "other name"],
)
def test_server_with_a_certificate_that_is_no_good_is_not_believed(
    authority: Authority, changes: dict[str, float], message: str
) -> None:
    tls = authority.issue("bad", mutual=False, **changes)  # type: ignore[arg-type]
    with served(tls) as server:
        error = refusal(server, authority.ca)
    assert isinstance(error, torch_ps.Refused)
    assert re.search(message, str(error)), str(error)


@contextlib.contextmanager
def served(tls: Tls) -> Iterator[str]:
    """A port with these files, as ``ps-serve`` opens it."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", port_credentials(tls))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_token_is_not_told_to_other_machines_in_the_clear(token: str) -> None:
    with pytest.raises(torch_ps.ConfigError, match=r"the token would be sent in the clear to 192.0.2.1:50051; use TLS"):
        Link(parse("192.0.2.1:50051"), Access(token=TokenFile(token)))
    Link(parse("192.0.2.1:50051"), Access(token=TokenFile(token), insecure=True)).close()
    Link(parse("127.0.0.1:50051"), Access(token=TokenFile(token))).close()


# ------------------------------------------------------------------ renewal


@dataclass
class Renewable:
    """A job whose files can be renewed: server and workers share certificate, key, authority and token."""

    folder: Path
    servers: Servers
    tls: Tls
    token: str

    @property
    def client(self) -> dict[str, Any]:
        return {"tls": self.tls, "token_file": self.token, "plane": "network"}

    def renew(self) -> None:
        authority = Authority(self.folder, "new")
        write(Path(self.tls.ca), authority.path.read_bytes())
        authority.issue("both")
        write(Path(self.token), b"another-secret-of-the-job")


@pytest.fixture
def renewable(tmp_path: Path) -> Iterator[Renewable]:
    authority = Authority(tmp_path, "old")
    tls = authority.issue("both")
    believed, token = tmp_path / "believed.pem", tmp_path / "token"
    write(believed, authority.path.read_bytes())
    write(token, TOKEN.encode())
    tls = Tls(str(believed), tls.cert, tls.key)
    with job(token_file=str(token), **options(tls)) as servers:
        yield Renewable(tmp_path, servers, tls, str(token))


def test_worker_reconnects_with_renewed_certificates_and_token(renewable: Renewable) -> None:
    with (
        Proxy(renewable.servers.addresses[0]) as proxy,
        torch_ps.Client(proxy.address, name="w0", **renewable.client) as worker,
    ):
        worker.init(model(), SPEC)
        assert worker.push(ones()).version == 1
        renewable.renew()
        assert worker.push(ones()).version == 2  # a connection lasts
        proxy.sever()
        until(lambda: proxy.num_severed == 1, "the connection is cut")
        assert worker.push(ones()).version == 3


def test_after_a_renewal_the_old_files_are_refused_and_the_new_ones_taken(renewable: Renewable) -> None:
    address, tls = renewable.servers.addresses[0], renewable.tls
    old = [Path(path).read_bytes() for path in (tls.ca, tls.cert, tls.key, renewable.token)]
    with torch_ps.Client(address, name="w0", **renewable.client) as worker:
        worker.init(model(), SPEC)
        renewable.renew()
        with torch_ps.Client(address, **renewable.client) as observer:
            assert observer.pull().version == 0
        for number, content in enumerate(old):
            write(renewable.folder / f"old{number}", content)
        before = [str(renewable.folder / f"old{number}") for number in range(4)]
        assert "is not of an authority" in str(refusal(address, Tls(*before[:3]), renewable.token))
        assert isinstance(refusal(address, tls, before[3]), torch_ps.Unauthenticated)
        assert worker.push(ones()).version == 1
    assert f"{tls.ca}, {tls.cert}, {tls.key} changed and is read again" in renewable.servers.log


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("both.cert.pem", b"nonsense", "is not in PEM form; the content read before stays in use"),
        ("believed.pem", b"nonsense", "holds no certificate in PEM form; the content read before stays in use"),
        ("token", b"short", "token 1 in .* has 5 characters; 16 to 1024 are needed"),
    ],
)
def test_renewal_that_is_no_good_leaves_the_old_files_in_force(
    renewable: Renewable, name: str, content: bytes, message: str
) -> None:
    path = renewable.folder / name
    good = path.read_bytes()
    with torch_ps.Client(renewable.servers.addresses[0], name="w0", **renewable.client) as worker:
        worker.init(model(), SPEC)
        (copies := renewable.folder / "copies").mkdir()
        tls = Tls(*(str(copy_to(copies, each)) for each in (renewable.tls.ca, *pair_of(renewable.tls))))
        token = str(copy_to(copies, renewable.token))
        write(path, content)
        for _ in range(2):
            with torch_ps.Client(renewable.servers.addresses[0], tls=tls, token_file=token) as observer:
                assert observer.pull().version == 0
        write(path, good)
    assert len(re.findall(message, renewable.servers.log)) == 1  # said once


def copy_to(folder: Path, path: str) -> Path:
    copy = folder / Path(path).name
    copy.write_bytes(Path(path).read_bytes())
    return copy


def ones() -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in model().items()}


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Norm", pb.NormRequest(shard=1, worker="", step=0, square=1.0)),
        ("Kept", pb.KeptRequest(shard=1, version=1, error="no")),
        ("Data", pb.DataRequest(worker="w0", session=1, give_back=True)),
    ],
)
def test_what_shards_tell_the_lead_needs_the_token_too(method: str, request_: Message, token: str) -> None:
    with job(token_file=token, clip_norm=1.0) as servers, grpc.insecure_channel(servers.addresses[0]) as stranger:
        call: Callable[..., bytes] = stranger.unary_unary(
            channel.method(method), lambda message: message.SerializeToString()
        )
        wrong = (("authorization", "Bearer " + "x" * 30),)
        for metadata, admitted in (((), False), (wrong, False), (TokenFile(token).metadata, True)):
            with pytest.raises(grpc.RpcError) as caught:
                call(request_, timeout=20, metadata=metadata)
            refused = caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert refused is not admitted, caught.value
