"""Driver of the failover state machine ``ps/core/failover/seat.py``: sends its vote requests, tells its listeners.

    workers    <-- RequestVotes, Declare: on their streams, or as an answer to Ballot -- SeatDriver <--> Seat
               --- Vote, accepted ------------------------------------------------>
    listeners  <-- Acknowledge, ConfigChange, Serve, StepDown, Transact, configurations

Rules of this file
  1. It decides nothing. Decisions are carried out in the order in which the seat gave them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import ballots
from torch_ps.common.wire.frames import pack
from torch_ps.common.wire.terms import Configuration
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.seat import (
    Acknowledge,
    Append,
    ConfigChange,
    Decision,
    Declare,
    Elector,
    Introduce,
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
#: Seconds for which a worker's request that a standby take over counts; workers repeat it several times a second.
PATIENCE_SECONDS = 5.0


class SeatListener:
    """Carries out decisions of a seat. Every method does nothing until a listener overrides it."""

    def on_acknowledge(self) -> None:
        """More of what was held back for the standby may go out."""

    def on_change(self, change: ConfigChange) -> None:
        """Primary: the seat has made a record, which the standby needs in its order among the others."""

    def on_serve(self, serve: Serve) -> None:
        """Standby: this server takes over."""

    def on_step_down(self, step_down: StepDown) -> None:
        """Another server serves the shard; this one never does again under its name."""

    def on_transact(self, transact: Transact) -> None:
        """With etcd: this transaction is to be tried at once."""

    def on_configuration(self, configuration: Configuration) -> None:
        """This configuration, primary and standby, is in force."""


def elected(name: str, primary: str) -> Seat:
    """A seat that the workers decide about."""
    return ElectedSeat(name, primary, patience=PATIENCE_SECONDS)


class SeatDriver:
    """One server's part in who serves its shard. All methods run on the event loop.

    Args:
        make: Makes the seat from this server's name and its primary's name, "" for none.
        name: Name of this life of this server, see ``torch_ps.common.wire.terms``.
        primary: Name or address of the server whose standby this is; "" on a primary.
        streams: Open streams to the workers.
    """

    def __init__(self, make: Callable[[str, str], Seat], name: str, primary: str, streams: Streams) -> None:
        self._make, self._seat, self._streams = make, make(name, primary), streams
        self._asks: RequestVotes | None = None  # that electors have to answer
        self._declares: Declare | None = None
        self._listeners: list[SeatListener] = []

    def add_listener(self, listener: SeatListener) -> None:
        """Have ``listener`` hear of every later decision, after the listeners that were added before."""
        self._listeners.append(listener)

    @property
    def seat(self) -> Seat:
        """The seat, brought to the present time."""
        return self._seat.at(clock())

    def restart(self, name: str, primary: str) -> None:
        """Begin again as a standby of ``primary``, under a new name: votes for the seat of before no longer count."""
        self._seat, self._asks, self._declares = self._make(name, primary), None, None

    def obey(self, decisions: Iterable[Decision]) -> bool:
        """Carry out what the seat has decided. Returns whether an ``Append`` was among it."""
        taken = False
        for decision in decisions:
            match decision:
                case RequestVotes():
                    self._asks, self._declares = decision, None
                    self._send(_ballot_of_ask(decision))
                case Declare():
                    self._asks, self._declares = None, None if decision.serving else decision
                    self._send(_ballot_of_declare(decision))
                    if decision.serving:
                        log.info("%s: %s", decision.configuration.term, decision.configuration)
                        for each in self._listeners:
                            each.on_configuration(decision.configuration)
                case Introduce():
                    self._send(pb.Ballot(standby=decision.standby))
                case Append():
                    taken = True
                case Acknowledge() | ConfigChange() | Serve() | StepDown() | Transact():
                    for each in self._listeners:
                        _tell(each, decision)
                case Receipt() | Refuse():  # the standby counts what it has taken, and ends the stream of a refused one
                    pass
        return taken

    @property
    def addresses(self) -> list[str]:
        """Addresses of the servers of this shard that this one knows, the primary's first."""
        configuration = self.seat.configuration
        return [ballots.address_of(each) for each in (configuration.primary, configuration.standby) if each]

    async def tick(self) -> None:
        """Tell the seat the time, every ``TICK_SECONDS``, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.obey(self.seat.tick(time.monotonic()))

    # -------------------------------------------------------------- workers

    def greeting(self) -> list[bytes]:
        """Frames that a worker's new stream begins with.

        The configuration in force, the standby if the worker has to say that it knows it, and what is asked of workers.
        """
        seat, found = self.seat, list[pb.Ballot]()
        if seat.configuration.term.number and seat.role in (Role.ALONE, Role.PAIRED):
            found.append(_ballot_of_declare(Declare(seat.configuration, True)))
        if seat.partner and not seat.follows:
            found.append(pb.Ballot(standby=seat.partner))
        return [_frame(each) for each in found + self._outstanding()]

    def take_paper(self, elector: Elector, paper: pb.BallotPaper) -> None:
        """Take a worker's answer to a vote request or to a declared configuration."""
        match paper.WhichOneof("kind"):
            case "vote":
                self.obey(self.seat.voted(elector, ballots.vote_from_proto(paper.vote)))
            case "accepted":
                self.obey(self.seat.accepted(elector, ballots.term_from_proto(paper.accepted)))
            case "standby":
                self.obey(self.seat.met(elector, paper.standby))

    def ballot(self, request: pb.BallotRequest) -> list[pb.Ballot]:
        """Serve Ballot, for a worker without a stream to this server: its answers, and whether it wants a takeover.

        Returns:
            What the worker is to answer next.
        """
        elector = request.worker, request.session
        for paper in request.paper:
            self.take_paper(elector, paper)
        if request.take_over:
            self.obey(self.seat.asked(elector, time.monotonic()))
        return self._outstanding()

    def _outstanding(self) -> list[pb.Ballot]:
        found = [_ballot_of_ask(self._asks)] if self._asks is not None else []
        return found + ([_ballot_of_declare(self._declares)] if self._declares is not None else [])

    def _send(self, ballot: pb.Ballot) -> None:
        frame = _frame(ballot)
        for stream in self._streams:
            if stream.worker is not None:
                stream.outbox.put_nowait(frame)


def _tell(listener: SeatListener, decision: Acknowledge | ConfigChange | Serve | StepDown | Transact) -> None:
    match decision:
        case Acknowledge():
            listener.on_acknowledge()
        case ConfigChange():
            listener.on_change(decision)
        case Serve():
            listener.on_serve(decision)
        case StepDown():
            listener.on_step_down(decision)
        case Transact():
            listener.on_transact(decision)


def _ballot_of_ask(ask: RequestVotes) -> pb.Ballot:
    return pb.Ballot(ask=pb.Ask(term=ballots.term_to_proto(ask.term), base=ballots.term_to_proto(ask.base)))


def _ballot_of_declare(declare: Declare) -> pb.Ballot:
    configuration = ballots.configuration_to_proto(declare.configuration)
    return pb.Ballot(declare=pb.Declare(configuration=configuration, serving=declare.serving))


def _frame(ballot: pb.Ballot) -> bytes:
    return pack(pb.DownHeader(ballot=ballot))
