"""What TLS costs on a socket of this machine's Python, without torch-ps: CPU seconds per GB, both ends together.

    python bench/tls.py                 # --megabytes 1000 --repeat 10 --json FILE

    plain        a TCP connection over loopback: one process sends 4 MiB at a time, another one receives them
    ssl          the same through ``ssl.SSLSocket``, whose calls wait
    ssl memory   the same through ``ssl.SSLObject``: records are made in memory, and leave and come 64 KiB at a time
    torch-ps     the same through ``common/security/tls_socket.py``, as streams of workers use it

Rows are interleaved, ``--repeat`` times; figures are medians.
"""

import json
import os
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull, rounds
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.tls_socket import Contexts, TlsSocket

PAYLOAD, CHUNK, NAME = 4 << 20, 1 << 16, "localhost"
#: Moves all of a payload, in one direction.
Move = Callable[[memoryview], None]


def plain(link: socket.socket, context: ssl.SSLContext, *, server: bool) -> tuple[Move, Move]:
    return link.sendall, lambda payload: _fill(link.recv_into, payload)


def blocking(link: socket.socket, context: ssl.SSLContext, *, server: bool) -> tuple[Move, Move]:
    tls = context.wrap_socket(link, server_side=server, server_hostname=None if server else NAME)
    return tls.sendall, lambda payload: _fill(tls.recv_into, payload)


def in_memory(link: socket.socket, context: ssl.SSLContext, *, server: bool) -> tuple[Move, Move]:
    came, leaves, read = ssl.MemoryBIO(), ssl.MemoryBIO(), memoryview(bytearray(CHUNK))
    tls = context.wrap_bio(came, leaves, server_side=server, server_hostname=None if server else NAME)

    def until(step: Callable[[], int | None]) -> int:
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                link.sendall(leaves.read())
                came.write(read[: link.recv_into(read)])
            else:
                link.sendall(leaves.read())
                return done or 0

    def send(payload: memoryview) -> None:
        for at in range(0, len(payload), CHUNK):
            until(lambda at=at: tls.write(payload[at : at + CHUNK]))  # type: ignore[misc]

    def receive(payload: memoryview) -> None:
        _fill(lambda rest: until(lambda: tls.read(len(rest), rest)), payload)  # type: ignore[arg-type, return-value]

    until(tls.do_handshake)
    return send, receive


def ours(link: socket.socket, context: ssl.SSLContext, *, server: bool) -> tuple[Move, Move]:
    tls = TlsSocket(link, context, server_name=None if server else NAME)
    tls.settimeout(rounds.DEADLINE)
    tls.handshake()

    def send(payload: memoryview) -> None:
        while payload:
            payload = payload[tls.sendmsg([payload]) :]

    return send, lambda payload: _fill(lambda rest: tls.recv_into(rest, flags=socket.MSG_WAITALL), payload)


ROWS = {"plain": plain, "ssl": blocking, "ssl memory": in_memory, "torch-ps": ours}


def _fill(read: Callable[[memoryview], int], payload: memoryview) -> None:
    while payload:
        count = read(payload)
        if not count:
            raise SystemExit("the other process has ended; its own message is above")
        payload = payload[count:]


def receiver(row: str, files: Tls, payloads: int, told: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.send(listener.getsockname())
        link, _ = listener.accept()
    _, receive = ROWS[row](link, Contexts(files, server=True).current(), server=True)
    payload, begin = memoryview(bytearray(PAYLOAD)), time.process_time()
    for _ in range(payloads):
        receive(payload)
    told.send((time.process_time() - begin, payload[:64].tobytes()))


def measure(row: str, files: Tls, ca: str, payloads: int) -> dict[str, float]:
    """CPU seconds per GB of either end.

    Raises:
        SystemExit: what was received is not what was sent.
    """
    here, there = rounds.context.Pipe()
    process = rounds.context.Process(target=receiver, args=(row, files, payloads, there))
    process.start()
    link = socket.create_connection(here.recv(), rounds.DEADLINE)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    send, _ = ROWS[row](link, Contexts(Tls(ca=ca), server=False).current(), server=False)
    payload, begin = memoryview(bytearray(os.urandom(PAYLOAD))), time.process_time()
    for _ in range(payloads):
        send(payload)
    sent = time.process_time() - begin
    received, first = here.recv()
    process.join(rounds.DEADLINE)
    if first != payload[:64]:
        raise SystemExit(f"{row}: other bytes were received than sent")
    gigabytes = payloads * PAYLOAD / 1e9
    return {"send": sent / gigabytes, "receive": received / gigabytes, "both": (sent + received) / gigabytes}


def main() -> None:
    parser = pushpull.options(__doc__, repeat=5)
    parser.add_argument("--megabytes", type=int, default=300, help="MB of one run of a row")
    arguments = parser.parse_args()
    from tests.support.certificates import Authority  # its package is for development only

    found: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        files = authority.issue("server", mutual=False)
        for _ in range(1 if arguments.quick else arguments.repeat):
            for row, runs in found.items():
                payloads = 8 if arguments.quick else max(arguments.megabytes * 1_000_000 // PAYLOAD, 1)
                runs.append(measure(row, files, authority.ca, payloads))
    sys.stdout.write(f"{ssl.OPENSSL_VERSION}, CPU s/GB\n{'row':<12}{'send':>8}{'receive':>9}{'both':>8}\n")
    for row, runs in found.items():
        send, receive, both = (statistics.median(each[end] for each in runs) for end in ("send", "receive", "both"))
        sys.stdout.write(f"{row:<12}{send:>8.3f}{receive:>9.3f}{both:>8.3f}\n")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"openssl": ssl.OPENSSL_VERSION, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
