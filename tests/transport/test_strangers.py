"""Which connections without an accepted call are closed, which hosts are banned, and that the kernel does it."""

import random
import socket
from collections import Counter

import pytest

from torch_ps.ps.transport.banned_hosts import attach, host_of, refuse_all
from torch_ps.ps.transport.strangers import (
    BAN_SECONDS,
    CLOSED_SECONDS,
    EVERYBODY,
    LONGEST_BAN_SECONDS,
    MAX_ABUSES,
    MAX_ABUSES_OF_ALL,
    MAX_BANNED,
    MAX_BYTES,
    MAX_BYTES_OF_ALL,
    MAX_REFUSED,
    MAX_SECONDS,
    MAX_STRANGERS,
    MAX_STRANGERS_OF_HOST,
    SHORT_SECONDS,
    Bans,
    Stranger,
    excessive,
)


def closed(strangers: list[Stranger], now: float = 0.0) -> list[Stranger]:
    return [stranger for stranger, _ in excessive(strangers, now)]


def of_hosts(**numbers: int) -> list[Stranger]:
    """So many strangers of each host; the hosts come one after the other."""
    return [Stranger(host, 0.0) for host, number in numbers.items() for _ in range(number)]


def test_stranger_at_its_limits_stays_and_one_beyond_any_of_them_goes() -> None:
    good = Stranger("a", 0.0, MAX_BYTES, MAX_REFUSED)
    bytes_, refused = Stranger("a", 0.0, MAX_BYTES + 1), Stranger("a", 0.0, 0, MAX_REFUSED + 1)
    assert closed([good, bytes_, refused], MAX_SECONDS) == [bytes_, refused]
    assert closed([good], MAX_SECONDS + 1) == [good]


def test_oldest_strangers_of_a_host_go_first() -> None:
    strangers = of_hosts(b=3, a=MAX_STRANGERS_OF_HOST + 2)
    found = closed(strangers)
    assert all(each is expected for each, expected in zip(found, strangers[3:5], strict=True))


def test_of_many_hosts_those_with_the_most_strangers_lose_them() -> None:
    half = MAX_STRANGERS // 2
    strangers = of_hosts(a=half, b=10, c=half, d=10)
    found = closed(strangers)
    assert len(found) == 20
    assert {each.host for each in found} == {"a", "c"}


@pytest.mark.parametrize("seed", range(5))
def test_whom_of_many_hosts_it_meets_is_each_time_the_oldest_of_the_first_with_the_most(seed: int) -> None:
    draw = random.Random(seed)
    strangers = [Stranger(str(draw.randrange(1, 2 + int(200 * draw.random()))), 0.0) for _ in range(3 * MAX_STRANGERS)]
    left, expected = list(strangers), list[Stranger]()
    while len(left) > MAX_STRANGERS:
        numbers = Counter(each.host for each in left)
        hosts = list(dict.fromkeys(each.host for each in strangers))
        most = max(hosts, key=numbers.__getitem__)
        expected.append(gone := next(each for each in left if each.host == most))
        left = [each for each in left if each is not gone]
    assert max(Counter(each.host for each in strangers).values()) <= MAX_STRANGERS_OF_HOST
    assert [id(each) for each in closed(strangers)] == [id(each) for each in expected]


def test_host_whose_strangers_are_abusive_is_banned_for_a_while() -> None:
    bans = Bans()
    for _ in range(MAX_ABUSES - 1):
        bans.note("a", 0.0)
    assert bans.banned(0.0) == set()
    bans.note("b", 0.0)
    bans.note("a", 1.0)
    assert bans.banned(1.0) == bans.banned(BAN_SECONDS) == {"a"}
    assert bans.banned(BAN_SECONDS + 1.0) == set()


def test_ban_after_a_ban_is_twice_as_long_up_to_the_longest() -> None:
    bans, now, lengths = Bans(), 0.0, list[float]()
    for _ in range(7):
        for _ in range(MAX_ABUSES):
            bans.note("a", now)
        assert bans.banned(now) == {"a"}
        lengths.append(next(s for s in range(1, 100) if "a" not in bans.banned(now + s)))
        now += lengths[-1]

    assert lengths == [BAN_SECONDS, 4, 8, 16, 32, LONGEST_BAN_SECONDS, LONGEST_BAN_SECONDS]
    now += LONGEST_BAN_SECONDS + 1
    assert bans.banned(now) == set()
    for _ in range(MAX_ABUSES):
        bans.note("a", now)
    assert bans.banned(now + BAN_SECONDS) == set()


def test_abuses_far_apart_ban_nobody() -> None:
    bans = Bans()
    for number in range(3 * MAX_ABUSES):
        bans.note("a", number * MAX_SECONDS / (MAX_ABUSES - 2))
    assert bans.banned(0.0) == set()


def test_port_is_closed_for_everybody_while_abuse_comes_from_many_hosts() -> None:
    bans = Bans()
    for host in range(MAX_ABUSES_OF_ALL - 1):
        bans.note(str(host), 0.0)
    assert bans.banned(0.0) == set()
    bans.note("another", CLOSED_SECONDS)
    assert bans.banned(CLOSED_SECONDS) == {EVERYBODY}
    assert bans.banned(2 * CLOSED_SECONDS) == set()


def test_port_is_closed_sooner_where_several_hosts_send_much_and_never_for_one() -> None:
    bans = Bans()
    bans.note("a", 0.0, 1 << 30)
    bans.note("b", 0.0, MAX_BYTES_OF_ALL)
    assert bans.banned(0.0) == set()
    bans.note("c", 0.0, 1)
    assert bans.banned(0.0) == {EVERYBODY}
    assert bans.banned(SHORT_SECONDS) == set()
    bans = Bans()
    bans.note("a", 0.0, 1 << 30)
    bans.note("b", CLOSED_SECONDS + 0.1, 1 << 30)
    assert bans.banned(CLOSED_SECONDS + 0.1) == set()


def test_number_of_banned_hosts_is_bounded() -> None:
    bans = Bans()
    for host in range(MAX_BANNED + 10):
        for _ in range(MAX_ABUSES):
            bans.note(str(host), 0.0)
    assert bans.banned(0.0) - {EVERYBODY} == {str(host) for host in range(10, MAX_BANNED + 10)}


def test_addresses_of_one_ipv6_network_are_one_host() -> None:
    assert host_of("10.0.0.7") == "10.0.0.7"
    assert host_of("2001:db8::1:2:3:4") == host_of("2001:db8::5") == "2001:db8::"
    assert host_of("2001:db8:0:1::5") == "2001:db8:0:1::"
    bans = Bans()
    for number in range(MAX_ABUSES):
        bans.note(host_of(f"2001:db8::{number}"), 0.0)
    assert bans.banned(0.0) == {"2001:db8::"}


@pytest.mark.parametrize("listen", ["127.0.0.1", "::"])
def test_banned_host_cannot_connect_and_others_can(listen: str) -> None:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    many = [f"10.0.{number >> 8}.{number & 255}" for number in range(MAX_BANNED - 2)]
    with socket.create_server((listen, 0), family=family, dualstack_ipv6=family is socket.AF_INET6) as server:
        port = server.getsockname()[1]
        attach(server, [*many, "127.0.0.2", "::1"])
        for host, enters in (("127.0.0.1", True), ("127.0.0.2", False), ("127.0.0.3", True)):
            assert _connects(host, "127.0.0.1", port) == enters
        if family is socket.AF_INET6:
            assert not _connects("::1", "::1", port)
        refuse_all(server)
        assert not _connects("127.0.0.1", "127.0.0.1", port)
        attach(server, [])
        assert _connects("127.0.0.2", "127.0.0.1", port)


def _connects(source: str, host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 0.2, source_address=(source, 0)).close()
    except TimeoutError:
        return False
    return True
