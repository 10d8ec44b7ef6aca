"""200 hostile connections at a time: two honest workers go on with the right numbers, and memory stays in its bounds.

Where nothing asks for a token, the bounds are those of ``ps/transport/limits.py``, ``first_messages.py`` beside it and
``common/rpc/channel.py``: 16 messages of one host are read at a time, of two kinds of call, and a model of 100,000
tensors takes a hundred MiB while it is looked at; 32 observers have two buckets each on the way; a call that is not
read holds 64 KiB. Without the limits the same attack takes gigabytes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import torch

import torch_ps
from tests.support.certificates import Authority, options
from tests.support.hostile import (
    LARGE,
    Attacker,
    Caller,
    attack,
    giant,
    half_handshake,
    half_open,
    noise,
    preface,
    pulls,
)
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from torch_ps.common.rpc.credentials import access_of

SIZE = 1 << 20  # parameters, in buckets of 1 MiB
SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)
STEPS = 10
MIB = 1 << 10  # of the kilobytes in /proc
LIMIT, STRANGERS_LIMIT = 1000 * MIB, 500 * MIB


def memory(servers: Servers, line: str) -> int:
    """Kilobytes of the server's memory: VmRSS now, VmHWM at most since ``forget``."""
    text = Path(f"/proc/{servers.processes[0].pid}/status").read_text()
    return int(text.split(f"{line}:")[1].split()[0])


def forget(servers: Servers) -> None:
    """Begin a new VmHWM; see proc(5), clear_refs."""
    Path(f"/proc/{servers.processes[0].pid}/clear_refs").write_text("5")


def files(servers: Servers) -> int:
    return len(os.listdir(f"/proc/{servers.processes[0].pid}/fd"))


def train(workers: list[torch_ps.Client], begin: int) -> None:
    """``STEPS`` steps of two workers; each is applied exactly once."""
    for step in range(begin + 1, begin + STEPS + 1):
        results = at_once(*(lambda w=worker: w.push({"x": torch.ones(SIZE)}) for worker in workers))
        for result in results:
            assert result.version == step
            assert result.contributors == ("w0", "w1")
            assert torch.equal(result.params["x"], torch.full((SIZE,), -float(step)))


def withstand(
    servers: Servers, workers: list[torch_ps.Client], attackers: Callable[[int], list[Attacker]], limit: int
) -> None:
    """Train before, during and after an attack, which may cost ``limit`` kilobytes.

    Args:
        attackers: 200, who know the number of the servers' incarnation as everybody does.
    """
    for worker in workers:
        worker.init({"x": torch.zeros(SIZE)}, SPEC)
    train(workers, 0)
    forget(servers)
    before = memory(servers, "VmRSS")
    hostile = attackers(servers.incarnation)
    assert len(hostile) == 200
    with attack(servers.addresses[0], hostile):
        train(workers, STEPS)
        train(workers, 2 * STEPS)
        assert memory(servers, "VmHWM") - before < limit
        assert files(servers) < 400
    train(workers, 3 * STEPS)
    assert servers.log.count("\n") < 200  # lines of a kind are counted when there are too many


def test_without_a_token_memory_is_bounded_and_workers_go_on() -> None:
    caller = Caller()
    with (
        job(workers=2, bucket_size=1.0) as servers,
        torch_ps.Client(str(servers), name="w0", plane="network") as first,
        torch_ps.Client(str(servers), name="w1", plane="network") as second,
    ):
        withstand(
            servers,
            [first, second],
            lambda incarnation: [
                *[half_open] * 40,
                *[noise] * 30,
                *[preface] * 30,
                *[caller.flood("Join", giant(1, 1 << 38, incarnation), 100)] * 10,
                *[caller.flood("Join", giant(100_001, 1, incarnation), 2)] * 10,
                *[caller.flood("Status", bytes(LARGE), 20)] * 10,
                *[caller.open_and_leave([])] * 20,
                *[caller.open_and_leave([bytes(LARGE)] * 20)] * 10,
                *[caller.open_and_leave(pulls(4, 500, incarnation))] * 40,
            ],
            LIMIT,
        )


def test_without_the_token_strangers_cost_less_and_workers_go_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server", mutual=False)
    token = tmp_path / "token"
    token.write_text("a-secret-of-the-job-0123456789")
    caller = Caller(grpc.ssl_channel_credentials(authority.path.read_bytes()))
    access: dict[str, Any] = {"tls": authority.ca, "token_file": str(token), "plane": "network"}
    with (
        job(workers=2, bucket_size=1.0, token_file=str(token), **options(server)) as servers,
        torch_ps.Client(str(servers), name="w0", **access) as first,
        torch_ps.Client(str(servers), name="w1", **access) as second,
    ):
        servers.access = access_of(authority.ca, "", "", str(token))
        withstand(
            servers,
            [first, second],
            lambda incarnation: [
                *[half_open] * 40,
                *[noise] * 40,
                *[half_handshake] * 40,
                *[caller.flood("Join", bytes(LARGE), 20)] * 40,
                *[caller.open_and_leave([bytes(LARGE)] * 20)] * 20,
                *[caller.open_and_leave(pulls(4, 500, incarnation))] * 20,
            ],
            STRANGERS_LIMIT,
        )
