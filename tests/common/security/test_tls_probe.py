"""A look at a port whose server dies while it is looked at."""

import gc
import socket
import ssl
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from torch_ps.common.security import tls_probe
from torch_ps.common.wire.address import Address


@pytest.fixture
def reset() -> Iterator[socket.socket]:
    """A connection that its server has reset."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as plain:
        peer, _ = server.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        yield plain


def test_connection_that_is_reset_says_nothing_and_is_closed(reset: socket.socket) -> None:
    assert tls_probe._without(reset, Address("127.0.0.1", 1)) is None
    gc.collect()  # what was not closed warns now, and a warning fails the test
    assert reset.fileno() == -1


def test_connection_that_is_reset_in_the_handshake_is_closed(
    reset: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tls = Authority(tmp_path_factory.mktemp("tls")).issue("worker")
    with pytest.raises(tls_probe._HungUp):
        tls_probe._with_tls(reset, Address("127.0.0.1", 1), tls)
    gc.collect()
    assert reset.fileno() == -1


@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize("after_handshake", [True, False])
def test_server_that_is_about_to_end_is_told_from_one_that_refuses(
    after_handshake: bool, ending: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    authority = Authority(tmp_path_factory.mktemp("tls"))
    tls, own = authority.issue("worker"), authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.cert, own.key)
    server = socket.create_server(("127.0.0.1", 0))
    address = Address("127.0.0.1", server.getsockname()[1])

    def hang_up() -> None:
        with server:
            for _ in range(1 if ending else tls_probe._TIMES):
                peer, _ = server.accept()
                if after_handshake:
                    peer = context.wrap_socket(peer, server_side=True)
                else:
                    peer.recv(1)
                peer.close()

    hanging = threading.Thread(target=hang_up)
    hanging.start()
    said = tls_probe.explain_failure(address, tls, 30)
    hanging.join()
    refusal = (
        f"server {address} refuses the certificate {tls.cert}, though it is of the authority in tls_ca here"
        if after_handshake
        else f"server {address} does not speak TLS, or ends the handshake"
    )
    assert said == (None if ending else refusal)
