"""Bytes that go over several connections in turn come out as they went in, whatever a connection takes."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from torch_ps.common.wire.striped_socket import BLOCK, StripedSocket

SECONDS = 60


@contextlib.contextmanager
def pair(count: int, *, waits: bool = True) -> Iterator[tuple[StripedSocket, StripedSocket]]:
    """Two ends of ``count`` connections; ``waits``: whether their calls wait."""
    ends = [socket.socketpair() for _ in range(count)]
    for connection in (each for both in ends for each in both):
        connection.settimeout(SECONDS if waits else 0)
    one, two = (StripedSocket(side) for side in zip(*ends, strict=True))
    yield one, two
    one.close()
    two.close()


def values(size: int) -> memoryview:
    return memoryview(bytearray(number % 251 for number in range(size)))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[5 * BLOCK + 3], [1, BLOCK - 1, BLOCK, 2 * BLOCK + 7, 20]], ids=["one", "several"])
def test_bytes_come_out_in_the_order_in_which_they_went_in(count: int, sizes: list[int]) -> None:
    sent = values(sum(sizes))

    def send(end: StripedSocket) -> None:
        at = 0
        for size in sizes:
            views = [sent[at : at + size // 2], sent[at + size // 2 : at + size]]
            while any(views):
                gone = end.sendmsg(views)
                views = [views[0][gone:], views[1][max(gone - len(views[0]), 0) :]]
            at += size

    with pair(count) as (one, two):
        sender = threading.Thread(target=send, args=(one,))
        sender.start()
        received = memoryview(bytearray(len(sent)))
        assert two.recv_into(received, flags=socket.MSG_WAITALL) == len(sent)
        sender.join(SECONDS)
    assert received == sent


def test_call_that_does_not_wait_takes_what_has_come_and_no_more() -> None:
    size = 2 * BLOCK + 5
    with pair(3, waits=False) as (one, two):
        received, left = memoryview(bytearray(2 * size)), values(size)
        with pytest.raises(BlockingIOError):
            two.recv_into(received)
        came = 0
        while left:
            with contextlib.suppress(BlockingIOError):
                left = left[one.sendmsg([left]) :]
            with contextlib.suppress(BlockingIOError):
                came += two.recv_into(received[came:])
        with contextlib.suppress(BlockingIOError):
            came += two.recv_into(received[came:])
        assert received[:came] == values(size)
        with pytest.raises(BlockingIOError):
            two.recv_into(received)


def test_call_that_waits_returns_what_has_come_where_less_is_wanted_than_all() -> None:
    with pair(2) as (one, two):
        one.sendmsg([values(BLOCK)[:100]])
        received = memoryview(bytearray(4 * BLOCK))
        assert two.recv_into(received) == 100


def test_one_connection_that_ends_ends_all_where_its_turn_comes() -> None:
    with pair(2) as (one, two):
        one.sendmsg([values(7)])
        one.shutdown(socket.SHUT_WR)
        received = memoryview(bytearray(BLOCK))
        assert two.recv_into(received, flags=socket.MSG_WAITALL) == 7
        assert two.recv_into(received) == 0
