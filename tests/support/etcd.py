"""A real etcd of one member, as a process; Debian's etcd-server has it."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

from torch_ps.common.security.tls import Tls

BINARY = shutil.which("etcd") or ""
needs_etcd = pytest.mark.skipif(not BINARY, reason="there is no etcd here; Debian's package etcd-server has it")
#: Seconds in which it has to answer.
DEADLINE = 60.0


class EtcdProcess:
    """Listens on ports of its own; with ``tls`` it speaks TLS, and with ``mutual`` it wants a certificate too."""

    def __init__(self, folder: Path, tls: Tls | None = None, *, mutual: bool = False) -> None:
        scheme = "http" if tls is None else "https"
        client, peer = _two_ports()
        self.address, self.url = ("127.0.0.1", client), f"{scheme}://127.0.0.1:{client}"
        command = [BINARY, "--data-dir", str(folder / "etcd"), "--log-outputs", str(folder / "etcd.log")]
        command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
        command += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
        command += ["--initial-cluster", f"default=http://127.0.0.1:{peer}", "--logger", "zap"]
        if tls is not None:
            command += ["--cert-file", tls.cert, "--key-file", tls.key]
        if tls is not None and mutual:
            command += ["--trusted-ca-file", tls.ca, "--client-cert-auth"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                socket.create_connection(self.address, 1.0).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """As if the machine that it runs on stood still."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def _two_ports() -> tuple[int, int]:
    """Free a moment ago: etcd cannot be told to choose its own."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]
