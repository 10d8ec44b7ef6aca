"""The servers of one shard, as one worker knows them: finds the one that serves, and votes when it is gone.

    describe each server --serves, and was not voted out--> the link goes there, and the stream after it
                         --none serves--> ask the standby to take over, vote, describe again
    ballot of a server --answer_ballot()--> vote, acceptance or refusal

Rules of this file
  1. The promises are the ``Acceptor``'s. They outlive every connection and every session of the worker.
  2. A worker has a stream to one server of a shard at a time, and asks another one to take over only when it has none.

Source: the protocol is that of ``ps/core/failover/seat.py``.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from torch_ps.common.errors import ConfigError, PsError, Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import address, ballots
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import pack
from torch_ps.common.wire.terms import Configuration, Term
from torch_ps.worker.transport.call_retry import RETRY_SECONDS
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.paxos_acceptor import Acceptor

log = logging.getLogger("torch_ps.worker")

#: Seconds in which a server has to describe itself when there is another one to ask.
DESCRIBE_SECONDS = 1.0
#: Seconds, beyond the lease, in which a standby has to take over.
TAKE_OVER_SECONDS = 10.0
#: Seconds for which a standby is asked to take over before the next round, and between two requests.
CAMPAIGN_SECONDS, CAMPAIGN_PAUSE_SECONDS = 2.0, 0.03


class ShardServers:
    """The servers of one shard.

    Args:
        link: connection to the shard; it is moved to the server that serves.
        servers: addresses of the shard's servers, at least one, the likeliest to serve first.

    Attributes:
        identity: name, session and secret of the worker in the job; session 0 before it has joined.
    """

    def __init__(self, link: Link, servers: Sequence[Address]) -> None:
        self.link, self.servers = link, list(servers)
        link.replaceable = len(servers) > 1
        self.acceptor = Acceptor()
        self.identity = "", 0, b""
        self._said: dict[Address, str] = {}  # what came of the last question to each server
        self._lock = threading.Lock()  # of the acceptor: ballots come on streams and in replies
        self._moving = threading.Lock()  # held by the thread that moves ``link``

    def patience(self, lease: float) -> float:
        """Seconds in which a server of the shard has to serve again, given the lease in seconds."""
        return lease + TAKE_OVER_SECONDS if len(self.servers) > 1 else lease

    @property
    def tried(self) -> str:
        """The servers that were asked, and what came of the last question to each."""
        return "; ".join(f"{each}: {self._said.get(each, 'not asked yet')}" for each in self.servers)

    def answer_ballot(self, ballot: pb.Ballot) -> bytes | None:
        """The frame that answers a ballot which came on the stream; None if there is nothing to answer."""
        paper = self._answer(ballot)
        return pack(pb.UpHeader(ballot=paper)) if paper is not None else None

    def _answer(self, ballot: pb.Ballot) -> pb.BallotPaper | None:
        match ballot.WhichOneof("kind"):
            case "ask":
                term, base = ballots.term_from_proto(ballot.ask.term), ballots.term_from_proto(ballot.ask.base)
                with self._lock:
                    vote = self.acceptor.vote(term, base)
                return pb.BallotPaper(vote=ballots.vote_to_proto(vote))
            case "declare":
                configuration = ballots.configuration_from_proto(ballot.declare.configuration)
                if ballot.declare.serving:
                    self._learn(configuration)
                    return None
                with self._lock:
                    if self.acceptor.accept(configuration):
                        return pb.BallotPaper(accepted=ballots.term_to_proto(configuration.term))
                    return pb.BallotPaper(vote=ballots.vote_to_proto(self.acceptor.refusal(configuration.term)))
            case "standby" if self._note(ballot.standby):
                return pb.BallotPaper(standby=ballot.standby)
        return None

    def note_standby(self, configuration: pb.Configuration) -> None:
        """Keep the address of the standby in a configuration that a server says to be in force."""
        self._learn(ballots.configuration_from_proto(configuration))

    def describe(self, seconds: float) -> pb.JobDescription:
        """Move ``link`` to the server that serves, and return what it says of its job; waits until one serves.

        Raises:
            Unreachable: none serves after ``seconds``; names them.
            Refused: TLS or the token is not right, as in ``Link.describe``.
        """
        if len(self.servers) == 1:
            told = self.link.describe(seconds)
            self._learn(ballots.configuration_from_proto(told.configuration))
            return told
        deadline = time.monotonic() + seconds
        while (found := self.find_serving()) is None:
            if time.monotonic() > deadline:
                raise Unreachable(f"no server of the shard serves after {seconds:.3g} s: {self.tried}; see their logs")
            time.sleep(RETRY_SECONDS)
        return found

    def find_serving(self) -> pb.JobDescription | None:
        """Ask every server once, and have a standby take over if none serves.

        Returns:
            What the server that serves says of its job, with ``link`` moved to it; None if none serves.
        """
        with self._moving:
            return self._find_serving()

    def _find_serving(self) -> pb.JobDescription | None:
        standbys, served = [], False
        for each in tuple(self.servers):
            told = self._describe_at(each)
            if told is None:
                continue
            if told.closed:
                standbys.append(each)
            elif self._learn(configuration := ballots.configuration_from_proto(told.configuration)):
                self._prefer(each)
                return told
            elif configuration.term.number:
                self._refuse(configuration.term)
                served = True
        for each in standbys if self.identity[1] and not served else ():
            if self._campaign(each):
                return self._describe_at(each)
        return None

    def _refuse(self, term: Term) -> None:
        """Tell a server that a higher term was promised, so that it takes a term in which this worker may speak to it.

        The alternative, asking its standby to take over, would promise the standby a still higher term.
        """
        with self._lock:
            papers = [pb.BallotPaper(vote=ballots.vote_to_proto(self.acceptor.refusal(term)))]
        worker, session, secret = self.identity
        with contextlib.suppress(PsError):
            for _ in range(2):  # the second time answers what the server asks in turn: it may have lost its standby
                request = pb.BallotRequest(worker=worker, session=session, secret=secret, paper=papers)
                reply = self.link.ballot(request, DESCRIBE_SECONDS) if papers else pb.BallotReply()
                papers = [paper for each in reply.ballot if (paper := self._answer(each)) is not None]

    def _describe_at(self, server: Address) -> pb.JobDescription | None:
        self.link.to(server)
        try:
            found = self.link.describe_once(DESCRIBE_SECONDS)
        except PsError as error:
            self._said[server] = self.link.reason(error)
            return None
        self._said[server] = found.closed or "it serves"
        return found

    def _campaign(self, standby: Address) -> bool:
        """Ask a standby to take over until it does, or until the next round is due; returns whether it serves."""
        self.link.to(standby)
        deadline = time.monotonic() + CAMPAIGN_SECONDS
        worker, session, secret = self.identity
        request = pb.BallotRequest(worker=worker, session=session, secret=secret, take_over=True)
        while time.monotonic() < deadline:
            try:
                reply = self.link.ballot(request, DESCRIBE_SECONDS)
            except PsError as error:
                log.debug("%s: %s", standby, error)
                return False
            if not reply.closed:
                served = self._learn(ballots.configuration_from_proto(reply.configuration))
                if served:
                    self._prefer(standby)
                return served
            del request.paper[:]
            request.paper.extend(paper for each in reply.ballot if (paper := self._answer(each)) is not None)
            if not request.paper:
                time.sleep(CAMPAIGN_PAUSE_SECONDS)
        return False

    def _learn(self, configuration: Configuration) -> bool:
        """Note that a server says that ``configuration`` is in force, and keep the address of its standby.

        Returns:
            Whether the worker may speak to that server.
        """
        with self._lock:
            may_speak = self.acceptor.learn(configuration)
        if may_speak and configuration.standby:
            self._note(configuration.standby)
        return may_speak

    def _note(self, standby: str) -> bool:
        """Keep the address of a server of this shard. Returns False if its name has none."""
        try:
            other = address.parse(ballots.address_of(standby))
        except ConfigError:
            return False
        if other not in self.servers:
            self.servers.append(other)
            self.link.replaceable = True
        return True

    def _prefer(self, server: Address) -> None:
        if server in self.servers:
            self.servers.remove(server)
        self.servers.insert(0, server)
