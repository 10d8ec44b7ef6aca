"""The hands of a seat: what ``ps/core/failover/seat.py`` decides about who serves is carried out here.

    workers  <-- RequestVotes, Declare: on their streams, or as an answer to Ballot -- SeatDriver <--> Seat
             --- Vote, accepted ------------------------------------------------>
    standby  <-- ConfigChange, as a frame among the others (replicate.py)
             --- frames, receipts (standby.py)

Rules of this file
  1. Decides nothing. Decisions are obeyed in the order in which the seat gave them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import ballots
from torch_ps.common.wire.frames import pack
from torch_ps.common.wire.terms import Configuration
from torch_ps.ps.core.failover.seat import (
    Acknowledge,
    Append,
    ConfigChange,
    Decision,
    Declare,
    Elector,
    Receipt,
    Refuse,
    RequestVotes,
    Role,
    Seat,
    Serve,
    StepDown,
    Transact,
)
from torch_ps.ps.job.conditions import clock
from torch_ps.ps.transport.streams import Streams

log = logging.getLogger("torch_ps.ps")

#: Seconds between two ticks of the seat.
TICK_SECONDS = 0.5


class SeatDriver:
    """One server's part in who serves its shard. All methods run on the event loop.

    Args:
        make: makes the seat, which decides, of this server's name and its primary's, "" for none.
        streams: to the workers.
    """

    def __init__(self, make: Callable[[str, str], Seat], name: str, primary: str, streams: Streams) -> None:
        self._make, self._seat, self._streams = make, make(name, primary), streams
        self._asks: RequestVotes | None = None  # that electors have to answer
        self._declares: Declare | None = None
        self.on_acknowledge: Callable[[], None] = lambda: None
        self.on_change: Callable[[ConfigChange], None] = lambda change: None
        self.on_serve: Callable[[Serve], None] = lambda serve: None
        self.on_step_down: Callable[[StepDown], None] = lambda step_down: None
        self.on_transact: Callable[[Transact], None] = lambda transact: None
        #: Called with who serves now and its standby, when that is in force.
        self.on_configuration: list[Callable[[Configuration], None]] = []

    @property
    def seat(self) -> Seat:
        """As it is now."""
        return self._seat.at(clock())

    def anew(self, name: str, primary: str) -> None:
        """A standby begins to follow: what its seat of before was given counts no more."""
        self._seat, self._asks, self._declares = self._make(name, primary), None, None

    def obey(self, decisions: Iterable[Decision]) -> bool:
        """Carry out what the seat has decided; whether a ``Append`` was among it."""
        taken = False
        for decision in decisions:
            match decision:
                case Acknowledge():
                    self.on_acknowledge()
                case ConfigChange():
                    self.on_change(decision)
                case RequestVotes():
                    self._asks, self._declares = decision, None
                    self._tell(_asked(decision))
                case Declare():
                    self._asks, self._declares = None, None if decision.serving else decision
                    self._tell(_declared(decision))
                    if decision.serving:
                        log.info("%s: %s", decision.configuration.term, decision.configuration)
                        for each in self.on_configuration:
                            each(decision.configuration)
                case Serve():
                    self.on_serve(decision)
                case StepDown():
                    self.on_step_down(decision)
                case Transact():
                    self.on_transact(decision)
                case Append():
                    taken = True
                case Receipt() | Refuse():  # the standby counts what it has taken, and ends the stream of a refused one
                    pass
        return taken

    @property
    def addresses(self) -> list[str]:
        """Where the servers of this shard are, as far as this one knows."""
        configuration = self.seat.configuration
        return [ballots.address_of(each) for each in (configuration.primary, configuration.standby) if each]

    async def keep(self) -> None:
        """Let the seat know of the time, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.obey(self.seat.tick(time.monotonic()))

    # -------------------------------------------------------------- workers

    def greeting(self) -> list[bytes]:
        """Frames that a worker's new stream begins with."""
        configuration = self.seat.configuration
        if not configuration.term.number:
            return []
        in_force = [_declared(Declare(configuration, True))] if self.seat.role in (Role.ALONE, Role.PAIRED) else []
        return [_frame(each) for each in in_force + self._outstanding()]

    def paper(self, elector: Elector, paper: pb.BallotPaper) -> None:
        """A worker has answered."""
        match paper.WhichOneof("kind"):
            case "vote":
                self.obey(self.seat.voted(elector, ballots.vote_from_proto(paper.vote)))
            case "accepted":
                self.obey(self.seat.accepted(elector, ballots.term_from_proto(paper.accepted)))

    def ballot(self, request: pb.BallotRequest) -> list[pb.Ballot]:
        """A worker that has no stream to this server answers, and asks it to take over; what it is to answer next."""
        elector = request.worker, request.session
        for paper in request.paper:
            self.paper(elector, paper)
        if request.take_over:
            self.obey(self.seat.asked(elector, time.monotonic()))
        return self._outstanding()

    def _outstanding(self) -> list[pb.Ballot]:
        found = [_asked(self._asks)] if self._asks is not None else []
        return found + ([_declared(self._declares)] if self._declares is not None else [])

    def _tell(self, ballot: pb.Ballot) -> None:
        frame = _frame(ballot)
        for stream in self._streams:
            if stream.worker is not None:
                stream.outbox.put_nowait(frame)


def _asked(ask: RequestVotes) -> pb.Ballot:
    return pb.Ballot(ask=pb.Ask(term=ballots.term_to_proto(ask.term), base=ballots.term_to_proto(ask.base)))


def _declared(declare: Declare) -> pb.Ballot:
    configuration = ballots.configuration_to_proto(declare.configuration)
    return pb.Ballot(declare=pb.Declare(configuration=configuration, serving=declare.serving))


def _frame(ballot: pb.Ballot) -> bytes:
    return pack(pb.DownHeader(ballot=ballot))
