"""One worker's part in who serves one shard: it finds the server that does, and votes when that one is gone.

    servers of the shard: look at each --serves, and was not voted out--> its stream is opened there
                                       --nobody does--> ask the standby to take over, vote, look again
    Ask, Declare of a server --frame()--> Vote, accepted

Rules of this file
  1. What is promised is in ``promises``; it outlives every connection, and every life of the worker in the job.
  2. A worker has a stream to one server of a shard at a time, and asks another one to take over only without.

Source: see ``ps/core/failover/seat.py``.
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
from torch_ps.worker.transport.acceptor import Acceptor
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.worker")

#: Seconds in which a server has to say what it is, when there is another one to ask.
LOOK_SECONDS = 1.0
#: Seconds after which all servers are looked at again.
LOOKS_PAUSE_SECONDS = 0.2
#: Seconds, beyond the lease, in which a standby has to take over.
TAKE_OVER_SECONDS = 10.0
#: Seconds for which a standby is asked before all are looked at again, and between two times that it is.
CAMPAIGN_SECONDS, PAUSE_SECONDS = 2.0, 0.03


class ShardServers:
    """The servers of one shard, as one worker knows them. ``link`` leads to the one that it speaks to.

    Args:
        servers: addresses of the shard's servers, at least one; the first is the likeliest to serve.
    """

    def __init__(self, link: Link, servers: Sequence[Address]) -> None:
        self.link, self.servers = link, list(servers)
        link.replaceable = len(servers) > 1
        self.acceptor = Acceptor()
        self.life = "", 0  # of the worker in the job: its name and session
        self._lock = threading.Lock()
        self._looking = threading.Lock()  # held by who moves ``link``

    def patience(self, lease: float) -> float:
        """Seconds in which a server of the shard has to serve again."""
        return lease + TAKE_OVER_SECONDS if len(self.servers) > 1 else lease

    def frame(self, ballot: pb.Ballot) -> bytes | None:
        """What to send to a server that asks or declares on its stream; None: nothing."""
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
        return None

    def describe(self, seconds: float) -> pb.JobDescription:
        """What the server says that serves, to which ``link`` leads now; waits until one does.

        Raises:
            Unreachable: none does after ``seconds``; names them.
            Refused: as ``Link.describe``.
        """
        if len(self.servers) == 1:
            told = self.link.describe(seconds)
            self._learn(ballots.configuration_from_proto(told.configuration))
            return told
        deadline = time.monotonic() + seconds
        while (found := self.look()) is None:
            if time.monotonic() > deadline:
                names = " and ".join(map(str, self.servers))
                raise Unreachable(f"none of {names} serves its shard after {seconds:.3g} s; see their logs")
            time.sleep(LOOKS_PAUSE_SECONDS)
        return found

    def look(self) -> pb.JobDescription | None:
        """Look at every server once, and have a standby take over if none serves.

        Returns:
            What the one says that serves, to which ``link`` leads now; None: there is none.
        """
        with self._looking:
            return self._look()

    def _look(self) -> pb.JobDescription | None:
        standbys, served = [], False
        for each in tuple(self.servers):
            told = self._look_at(each)
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
        for each in standbys if self.life[1] and not served else ():
            if self._campaign(each):
                return self._look_at(each)
        return None

    def _refuse(self, term: Term) -> None:
        """Tell a server that a higher term was promised, so that it takes one that this worker may speak to.

        That is how to get on; to ask its standby to take over would be to promise that one a still higher term.
        """
        with self._lock:
            papers = [pb.BallotPaper(vote=ballots.vote_to_proto(self.acceptor.refusal(term)))]
        worker, session = self.life
        with contextlib.suppress(PsError):
            for _ in range(2):  # the second time what it asks in turn: it may have lost its standby
                request = pb.BallotRequest(worker=worker, session=session, paper=papers)
                reply = self.link.ballot(request, LOOK_SECONDS) if papers else pb.BallotReply()
                papers = [paper for each in reply.ballot if (paper := self._answer(each)) is not None]

    def _look_at(self, server: Address) -> pb.JobDescription | None:
        self.link.to(server)
        try:
            # With nobody else to ask it is worth a wait: a channel that has failed does not try again at once.
            return self.link.look(LOOK_SECONDS) if len(self.servers) > 1 else self.link.describe(LOOK_SECONDS)
        except PsError as error:
            log.debug("%s: %s", server, error)
            return None

    def _campaign(self, standby: Address) -> bool:
        """Ask a standby to take over until it does, or it is time to look again."""
        self.link.to(standby)
        deadline = time.monotonic() + CAMPAIGN_SECONDS
        request = pb.BallotRequest(worker=self.life[0], session=self.life[1], take_over=True)
        while time.monotonic() < deadline:
            try:
                reply = self.link.ballot(request, LOOK_SECONDS)
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
                time.sleep(PAUSE_SECONDS)
        return False

    def _learn(self, configuration: Configuration) -> bool:
        """A server says that this is in force; whether to speak to it. Its standby's address is kept."""
        with self._lock:
            may_speak = self.acceptor.learn(configuration)
        if may_speak and configuration.standby:
            try:
                other = address.parse(ballots.address_of(configuration.standby))
            except ConfigError:
                return may_speak
            if other not in self.servers:
                self.servers.append(other)
                self.link.replaceable = True
        return may_speak

    def _prefer(self, server: Address) -> None:
        if server in self.servers:
            self.servers.remove(server)
        self.servers.insert(0, server)
