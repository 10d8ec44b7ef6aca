"""The right to serve as a key in a real etcd: leases that run out, an etcd that stands still, users and TLS."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.etcd import EtcdProcess, needs_etcd
from torch_ps.common.errors import ConfigError, NameTaken, PsError, Unreachable
from torch_ps.common.options.parsers import parse_etcd
from torch_ps.common.security.tls import Tls
from torch_ps.common.wire.terms import Configuration, Term
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Acknowledge, ConfigChange, Decisions, Role, StepDown, Transact
from torch_ps.ps.failover.etcd import EtcdClient
from torch_ps.ps.job.conditions import clock

#: Seconds of a lease that a test waits for, and of one that does not run out in a test.
SHORT, LONG = 8, 100
DEADLINE = 60.0


class Holder:
    """A seat and its etcd, one call after the other."""

    def __init__(self, url: str, me: str, primary: str = "", tls: Tls | None = None, ttl: int = LONG) -> None:
        self.seat, self.etcd = LeasedSeat(me, primary), EtcdClient(parse_etcd(url), 0, ttl, tls)

    def look(self) -> Decisions:
        self.etcd.renew()
        return self.obey(self.seat.at(clock()).observed(*self.etcd.look(), self.etcd.until))

    def obey(self, decisions: Decisions) -> Decisions:
        done: Decisions = ()
        for each in decisions:
            if isinstance(each, Transact):
                revision = self.etcd.transact(each, self.seat.me)
                done += self.seat.at(clock()).decided(each, revision, self.etcd.until) if revision else ()
            else:
                done += (each,)
        return done

    def until(self, role: Role) -> Decisions:
        """Look again and again until this is its role."""
        deadline = time.monotonic() + DEADLINE
        decisions: Decisions = ()
        while self.seat.role is not role:
            assert time.monotonic() < deadline, self.seat.role
            decisions += self.look()
            time.sleep(0.1)
        return decisions


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(tmp_path) as process:
        yield process


def pair(url: str) -> tuple[Holder, Holder]:
    p, s = Holder(url, "P", ttl=SHORT), Holder(url, "S", "P", ttl=SHORT)
    p.until(Role.ALONE)
    s.seat.begin_at(p.seat.recorded)
    _, change = p.obey(p.seat.at(clock()).attach("S"))
    assert isinstance(change, ConfigChange)
    s.seat.received("P", change.number, change)
    p.seat.at(clock()).receipt("S", change.number)
    return p, s


@needs_etcd
def test_a_standby_takes_over_when_a_real_lease_runs_out_and_the_primary_acknowledges_nothing_more(
    etcd: EtcdProcess,
) -> None:
    p, s = pair(etcd.url)
    s.look()
    number, _ = p.seat.at(clock()).record()
    s.seat.received("P", number)
    assert s.seat.role is Role.STANDBY  # P holds it
    decisions = s.until(Role.ALONE)  # P does not renew: as if it stood still
    assert Acknowledge(number) in decisions
    assert p.seat.at(clock()).receipt("S", number) == ()
    (stopped,) = p.look()
    assert isinstance(stopped, StepDown)
    assert stopped.configuration == Configuration(Term(3, "S"))


@needs_etcd
def test_a_primary_holds_back_while_etcd_stands_still_and_goes_on_when_it_answers(etcd: EtcdProcess) -> None:
    p = Holder(etcd.url, "P", ttl=SHORT)
    p.until(Role.ALONE)
    etcd.stop()
    with pytest.raises(Unreachable, match="etcd does not answer"):
        p.look()
    while clock() < p.etcd.until:
        time.sleep(0.1)
    number, decisions = p.seat.at(clock()).record()
    assert decisions == ()
    etcd.go_on()
    deadline = time.monotonic() + DEADLINE
    while p.seat.safe < number:
        assert time.monotonic() < deadline
        try:
            p.look()
        except PsError:
            time.sleep(0.1)
    assert p.seat.role is Role.ALONE


@needs_etcd
def test_a_second_primary_is_told_who_serves_and_may_when_that_one_has_given_up(etcd: EtcdProcess) -> None:
    p, q = Holder(etcd.url, "P"), Holder(etcd.url, "Q")
    p.until(Role.ALONE)
    with pytest.raises(NameTaken, match="P serves in term 1 of P"):
        q.look()
    other = Holder(f"{etcd.url}/another-job", "O")
    other.until(Role.ALONE)
    p.etcd.give_up()
    q.until(Role.ALONE)
    assert isinstance(p.look()[0], StepDown)


@needs_etcd
def test_an_etcd_that_wants_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with EtcdProcess(tmp_path, authority.issue("etcd"), mutual=True) as process:
        p = Holder(process.url, "P", tls=authority.issue("server"))
        p.until(Role.ALONE)
        with pytest.raises(Unreachable, match="etcd does not answer"):
            Holder(process.url, "Q", tls=Tls(ca=authority.ca)).look()
        with pytest.raises(Unreachable, match="certificate verify failed"):
            Holder(process.url, "Q").look()


@needs_etcd
def test_an_etcd_with_users_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    believed = Tls(ca=authority.ca)
    with EtcdProcess(tmp_path, authority.issue("etcd")) as process:
        p = Holder(process.url, "P", tls=believed)
        p.until(Role.ALONE)
        for method, body in (
            ("auth/user/add", {"name": "root", "password": "pw"}),
            ("auth/role/add", {"name": "root"}),
            ("auth/user/grant", {"user": "root", "role": "root"}),
            ("auth/enable", {}),
        ):
            p.etcd._post(method, body)
        with pytest.raises(PsError, match=r"etcd at .* refuses auth/authenticate: .*invalid user ID or password"):
            Holder(process.url.replace("://", "://root:wrong@"), "Q", tls=believed).look()
        with pytest.raises(NameTaken, match="P serves"):
            Holder(process.url.replace("://", "://root:pw@"), "Q", tls=believed).look()


def test_several_addresses_are_tried_in_turn_and_bad_ones_refused() -> None:
    endpoint = parse_etcd("http://u:p%40@a:2379,http://b:2379/job")
    assert endpoint == (("http://a:2379", "http://b:2379"), "u", "p@", "job")
    for bad in ("a:2379", "ftp://a:1", "http://a", "http://a:99999", "http://a:1?x=1", ""):
        with pytest.raises(ConfigError, match="etcd must be http://HOST:PORT"):
            parse_etcd(bad)
