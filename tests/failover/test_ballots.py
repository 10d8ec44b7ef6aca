"""Elections that come to nothing, or half-way: what a standby, a primary and a worker do then, all real processes."""

import signal
from typing import Any

import torch

import torch_ps
from tests.support.jobs import SECONDS, until
from tests.support.raw import described, raw, secret_of
from tests.support.replicated import Replicated, Server, replicated
from tests.support.threads import spawn
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import address, ballots
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.paxos_acceptor import Acceptor

LEASE = 3.0
SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)
ZEROS, ONES = {"x": torch.zeros(8)}, {"x": torch.ones(8)}


class Elector:
    """A worker that asks, votes and accepts when it is told to, and does nothing else."""

    def __init__(self, servers: Replicated, name: str, session: int, secret: bytes) -> None:
        self._name, self._session, self._secret, self._acceptor = name, session, secret, Acceptor()
        standby = servers.status(servers.standbys[0]).standby
        self._acceptor.learn(ballots.configuration_from_proto(standby.configuration))

    def say(self, server: Server, *papers: pb.BallotPaper, take_over: bool = False) -> list[pb.Ballot]:
        """Send ballot papers; returns the requests for votes with which the server answers."""
        link = Link(address.parse(server.address))
        request = pb.BallotRequest(worker=self._name, session=self._session, paper=papers, take_over=take_over)
        request.secret = self._secret
        try:
            return list(link.ballot(request, SECONDS).ballot)
        finally:
            link.close()

    def vote(self, ballot: pb.Ballot) -> pb.BallotPaper:
        asked = ballot.ask
        vote = self._acceptor.vote(ballots.term_from_proto(asked.term), ballots.term_from_proto(asked.base))
        assert vote.granted
        return pb.BallotPaper(vote=ballots.vote_to_proto(vote))

    def accept(self, ballot: pb.Ballot) -> pb.BallotPaper:
        assert not ballot.declare.serving
        assert self._acceptor.accept(ballots.configuration_from_proto(ballot.declare.configuration))
        return pb.BallotPaper(accepted=ballot.declare.configuration.term)


def begun(servers: Replicated, client: torch_ps.Client) -> int:
    """Has made a step of a job whose primary relies on its standby; the session of the worker."""
    client.init(ZEROS, SPEC)
    servers.wait()
    client.push(ONES)
    return servers.status(servers.primaries[0]).worker[0].session


def test_standby_that_was_given_the_votes_waits_to_take_over_and_follows_its_primary_no_more() -> None:
    with replicated(workers=1, lease=LEASE, mode="async") as servers:
        primary, standby = servers.primaries[0], servers.standbys[0]
        with torch_ps.Client(str(servers), name="w0") as client:
            session = begun(servers, client)
            secret = client._session.identity.secret
        # who has left and is the last elector, for another has not come yet
        elector = Elector(servers, "w0", session, secret)
        primary.process.send(signal.SIGSTOP)
        (ask,) = elector.say(standby, take_over=True)
        (declare,) = elector.say(standby, elector.vote(ask))
        assert servers.role(standby) == "confirming"
        primary.process.send(signal.SIGCONT)
        with raw(primary.address) as other:  # its record is refused, so that the standby's stream ends
            spawn(lambda: other.join(pb.JoinRequest(worker="w1", model=described(ZEROS))))
            until(lambda: servers.role(standby) != "" and "waiting to take over" in standby.process.output, "it waits")
        assert servers.role(standby) == "confirming"
        assert servers.role(primary) == "asking"
        elector.say(standby, elector.accept(declare))
        until(lambda: servers.role(standby) == "alone", "it serves")
        assert primary.process.wait(SECONDS) == 1
        assert f"shard 0 is served by {standby.address} now" in primary.process.output
        with torch_ps.Client(standby.address) as observer:
            assert observer.pull().params["x"].tolist() == [-1.0] * 8


def test_worker_that_voted_in_vain_has_its_primary_take_a_higher_term_and_goes_on() -> None:
    with (
        replicated(workers=1, lease=LEASE, mode="async") as servers,
        torch_ps.Client(str(servers), name="w0", timeout=SECONDS) as client,
        raw(str(servers)) as other,
    ):
        primary, standby = servers.primaries[0], servers.standbys[0]
        begun(servers, client)
        session = other.join(pb.JoinRequest(worker="w1", model=described(ZEROS))).session
        elector = Elector(servers, "w1", session, secret_of("w1"))
        met = servers.status(primary).standby.configuration.standby
        elector.say(primary, pb.BallotPaper(standby=met))  # from now on it is an elector
        client.push(ONES)  # the standby knows of both electors when this is answered
        acceptor: Any = client._session._shards[0].acceptor
        primary.process.send(signal.SIGSTOP)

        def promised() -> bool:
            elector.say(standby, take_over=True)  # and never votes
            return bool(acceptor.promised.number == 2)

        until(promised, "w0 has voted for the standby")
        assert servers.role(standby) == "asking"
        primary.process.send(signal.SIGCONT)
        assert client.push(ONES).params["x"].tolist() == [-3.0] * 8
        assert servers.role(primary) == "paired"
        assert f"term 3 of {primary.address}" in primary.process.output
