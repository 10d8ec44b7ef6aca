"""The connection of a worker to one shard: unary calls, and the stream that it opens.

Rules of this file
  1. Every call has a deadline, and every failure comes out as an error of ``torch_ps.common.errors``.
  2. A new connection reads the certificates again, and every call reads the token again, so both may be replaced while
     a worker runs.
  3. A stopped server keeps its connections open. Where another server may take its place, a call that may take long is
     waited for only while the server answers heartbeats.
  4. A server may come back under its name at another address, and the old one may vanish without a word. So after a
     call that nothing has answered the next one makes new connections, which look the name up.
  5. A server with more new calls than it reads drops some of them unread. Such a call is made again in its time.
  6. Heartbeats and copies of pushes have a connection of their own. On a slow network a bucket fills the other one for
     longer than a lease, with megabytes in buffers that nothing can overtake.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from torch_ps.common import version
from torch_ps.common.errors import (
    NoSharedMemory,
    NotServing,
    PsError,
    Refused,
    Restarted,
    ServerStopped,
    Unreachable,
    WaitTimeout,
)
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import OPEN, Access
from torch_ps.common.rpc.status import error_of, is_unread
from torch_ps.common.security import tls_probe
from torch_ps.common.security.tls_socket import Contexts
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.socket_frames import FindPlace
from torch_ps.common.wire.striped_socket import Connection, StripedSocket
from torch_ps.worker.runtime import graceful_shutdown
from torch_ps.worker.transport.call_retry import RETRY_SECONDS
from torch_ps.worker.transport.grpc_stream import GrpcStream
from torch_ps.worker.transport.server_sockets import NoDataPort, connect_data, connect_unix
from torch_ps.worker.transport.socket_stream import SocketStream
from torch_ps.worker.transport.stream import OnEnd, OnMessage, Stream

log = logging.getLogger("torch_ps.worker")
Reply = TypeVar("Reply", bound=Message)
Answer = TypeVar("Answer")

#: Seconds that a probe of a port takes at most to find out why a TLS connection to it fails.
PROBE_SECONDS = 3.0
#: Seconds in which a server has to answer one heartbeat, at most.
HEARTBEAT_SECONDS = 1.0
#: Seconds after which copies of pushes help no more.
COMMIT_SECONDS = 5.0

_Channels = tuple[grpc.Channel, ...]


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connected socket of a server, or why there is none: ``reason`` is for people, "" with a socket."""

    connection: Connection | StripedSocket | None
    reason: str

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self.connection is not None:
            self.connection.close()


class Link:
    """The connection to one shard.

    Args:
        address: address of the server.
        access: TLS and token settings.
        plane: the plane of the ``Session``; with "network" the stream never goes over the server's Unix socket, with
            "grpc" over no socket at all.
        connections: number of connections to the server's data port that the stream goes over.

    A server that was reached at another port than the one it listens on stands behind a proxy or a tunnel, and the
    stream goes through that, too.

    Attributes:
        address: address of the server that the calls go to now.
        replaceable: whether another server may take this one's place.
        lease: length of the job's lease in seconds, as the server has said; 0 before it has said anything.

    Raises:
        ConfigError: the token would travel in the clear to another machine.
    """

    def __init__(self, address: Address, access: Access = OPEN, plane: str = "network", connections: int = 1) -> None:
        access.check(address)
        self.address, self._access, self._plane, self._connections = address, access, plane, connections
        self._socket, self._data_port = pb.SocketOffer(), pb.DataPortOffer()
        self._contexts = Contexts(access.tls, server=False) if access.tls is not None else None
        self._data_ports = dict[bytes, bool]()  # by token of the offer: whether it was reached
        self._interruptible: set[Any] = set()  # calls that ``interrupt`` ends
        self._interrupts = 0  # times that ``interrupt`` was called
        self._committing: Any = None  # the last call Commit
        self.replaceable = False
        self.lease = 0.0
        self._incarnation = 0
        self._suspect = False  # the last call to see whether the server lives was not answered
        self._connect()

    def _connect(self) -> None:
        """Make new connections; calls under way end on those that they began on."""
        self._mark, self._suspect = self._access.mark, False
        self._channel = self._access.connect(self.address)
        # Heartbeats try their own connection first, then the common one: a server may refuse new connections and live.
        self._heartbeat_channels: _Channels = (self._access.connect(self.address), self._channel)

    def to(self, address: Address) -> None:
        """Send calls to another server of the shard from now on; calls under way end where they began."""
        self._access.check(address)
        if address != self.address or self._access.mark != self._mark or self._suspect:
            self.address = address
            self._connect()

    def describe_once(self, seconds: float) -> pb.JobDescription:
        """Ask the server to describe its job, without the model. One try, which does not wait for it to come up.

        Raises:
            Refused: the server is of a version that does not understand this one; says which to upgrade.
            PsError: it does not answer.
        """
        self.to(self.address)
        return self._described(pb.DescribeRequest(version=version.current()), seconds)

    def ballot(self, request: pb.BallotRequest, seconds: float) -> pb.BallotReply:
        """Bring votes to a server, or ask it to take over; the reply may ask for more votes."""
        return self._unary("Ballot", request, pb.BallotReply, seconds)

    def dial(self) -> Dialled:
        """Connect to the fastest socket of the server that can be reached. It takes two seconds where one is silent.

        That is its Unix socket if it is on this host and reached directly, else its data port.
        """
        if self._plane in ("auto", "memory") and self._socket.port == self.address.port:
            try:
                return Dialled(connect_unix(self._socket), "")
            except NoSharedMemory as error:
                log.debug("the stream to %s goes over the network: %s", self.address, error)
        try:
            return Dialled(self._connect_data(), "")
        except NoDataPort as error:
            return Dialled(None, str(error))

    def open(
        self,
        dialled: Dialled,
        on_message: OnMessage,
        on_end: OnEnd,
        place: FindPlace = lambda head, size: None,
    ) -> Stream:
        """Open the stream over the socket that was dialled, or over gRPC if there is none.

        Args:
            dialled: what ``dial`` has found.
            on_message: function that takes each message.
            on_end: function that takes the error that ends the stream.
            place: function that finds where a payload is to be received if a socket carries the stream.
        """
        if dialled.connection is not None:
            return SocketStream(dialled.connection, self.address, on_message, on_end, place)
        return GrpcStream(functools.partial(self._start_exchange, dialled.reason), self.address, on_message, on_end)

    def _connect_data(self) -> Connection | StripedSocket:
        """Connect to the server's data port. One that was never reached is tried once: that may take two seconds.

        Raises:
            NoDataPort: it cannot be used; says why.
        """
        offer, reached = self._data_port, self._data_ports.get(self._data_port.token)
        if self._plane == "grpc":
            raise NoDataPort("plane is grpc")
        if reached is False:
            raise NoDataPort("the data port could not be reached before")
        try:
            connection = connect_data(self.address, offer, self._contexts, self._connections)
        except NoDataPort as error:
            if offer.port and reached is None:
                log.warning("gRPC, which is slower, carries all frames to and from %s: %s", self.address, error)
                self._data_ports[offer.token] = False
            raise
        self._data_ports[offer.token] = True
        return connection

    def _start_exchange(self, reason: str, frames: Iterator[bytes]) -> Any:
        """Begin the call Exchange, which carries bytes both ways; ``reason`` says why no socket does."""
        call: Any = self._channel.stream_stream(channel.method("Exchange"), None, None)
        told = (channel.CARRIER_KEY, reason[: channel.MAX_REASON].encode("ascii", "replace").decode("ascii"))
        return call(frames, metadata=(*self._access.metadata, told))

    def describe(self, seconds: float) -> pb.JobDescription:
        """Ask the server to describe its job, without the model; waits until it answers.

        Connects again if the certificates have changed or nothing has answered the last time.

        Raises:
            Unreachable: no answer came within ``seconds``; names the address and the reason.
            Refused: TLS, the token or the version is not right, which waiting would not change; says which side and
                what.
        """
        self.to(self.address)
        request, deadline = pb.DescribeRequest(version=version.current()), time.monotonic() + seconds
        try:
            return self._described(request, seconds)
        except WaitTimeout:
            reason = "it takes the call and does not answer"
        except (Unreachable, ServerStopped) as error:  # it may come up in time, unless TLS keeps this worker out
            self._check_tls(seconds)
            left = max(deadline - time.monotonic(), 0.1)
            log.warning("no server answers at %s yet (%s); looking for %.0f s", self.address, self.reason(error), left)
            try:
                return self._described(request, left, wait=True)
            except WaitTimeout:
                reason = self._why()
        raise Unreachable(
            f"no server answers at {self.address} within {seconds:.3g} s: {reason}; "
            "check the address and that ps-serve runs there"
        )

    def _described(self, request: pb.DescribeRequest, seconds: float, *, wait: bool = False) -> pb.JobDescription:
        try:
            job = self._unary("Describe", request, pb.JobDescription, seconds, wait=wait)
        except (Unreachable, WaitTimeout):
            self._suspect = True
            raise
        version.check(f"the server at {self.address}", job.version, "this worker")
        self._socket, self._data_port = job.socket, job.data_port
        self.lease, self._incarnation = job.lease_seconds, job.incarnation
        return job

    def _why(self) -> str:
        """Why nothing answers at this address: a call that does not wait for the server fails with the reason."""
        try:
            self._unary("Describe", pb.DescribeRequest(), pb.JobDescription, 1.0)
        except PsError as error:
            return self.reason(error)
        return "it has just begun to answer"

    def reason(self, error: PsError) -> str:
        """What an error of a call says, for a sentence that names the address already."""
        text = str(error).removeprefix(f"server {self.address}").lstrip(": ").removeprefix("does not answer: ")
        return text.replace("did not answer", "it did not answer") if text.startswith("did not answer") else text

    def model(self, seconds: float) -> pb.Model:
        """The model that the shard trains; waits until it has parameters."""
        return self._while_alive("Describe", pb.DescribeRequest(model=True), pb.JobDescription, seconds).model

    def join(self, request: pb.JoinRequest, seconds: float) -> pb.JoinReply:
        """Join the job; waits until the lead lets the worker in."""
        return self._while_alive("Join", request, pb.JoinReply, seconds)

    def share(self, request: pb.ShareRequest, seconds: float) -> pb.ShareReply:
        """Offer memory to the server; the reply offers the server's own, or says why it shares none."""
        return self._while_alive("Share", request, pb.ShareReply, seconds)

    def _while_alive(self, name: str, request: Message, reply: type[Reply], seconds: float) -> Reply:
        """Make a call that may take long.

        Raises:
            Unreachable: no heartbeat was answered for a lease, and another server may take this one's place.
        """
        method = self._channel.unary_unary(channel.method(name), type(request).SerializeToString, reply.FromString)
        channels = self._heartbeat_channels  # to this server, wherever the link leads later

        def attempt(left: float) -> Reply:
            heard = time.monotonic()
            call = method.future(request, timeout=left, metadata=self._access.metadata)
            try:
                while True:
                    try:
                        answer: Reply = call.result(self.lease / 3 if self.replaceable else None)
                        return answer
                    except grpc.FutureTimeoutError:
                        heard = self.renew(pb.RenewRequest(), heard, self.lease, channels)
            finally:
                call.cancel()

        return self._until_read(attempt, seconds)

    def renew(self, request: pb.RenewRequest, heard: float, seconds: float, channels: _Channels | None = None) -> float:
        """Send one heartbeat, which renews the lease that ``request`` names, and wait for the answer.

        Args:
            request: worker and session; empty to ask whether the server lives and no more.
            heard: time of the last sign of life of the server, on ``time.monotonic()``.
            seconds: silence after which the server counts as gone.
            channels: connections to try, in this order; None: those to the current server.

        Returns:
            When the server was heard last, on ``time.monotonic()``.

        Raises:
            Unreachable: the server was silent for more than ``seconds``, or another one answers in its place.
        """
        begin, patience, said = time.monotonic(), min(HEARTBEAT_SECONDS, seconds / 3), ""
        request.incarnation = self._incarnation
        with contextlib.ExitStack() as stack:
            tried = channels or self._heartbeat_channels
            if begin - heard > seconds / 3:  # where nothing has answered, a new connection looks the name up
                tried = (*tried, stack.enter_context(contextlib.closing(self._access.connect(self.address))))
            for each in tried:
                try:
                    self._unary("Renew", request, pb.RenewReply, patience, over=each)
                except (Unreachable, WaitTimeout, NotServing) as error:
                    said = said or self.reason(error)
                except Restarted:
                    self._suspect = True
                    raise Unreachable(f"another server answers at {self.address} now") from None
                except PsError:  # a server that refuses lives; what the refusal means shows elsewhere
                    return begin
                else:
                    return begin
        silent = time.monotonic() - heard
        if silent > seconds:
            self._suspect = True
            raise Unreachable(f"no sign of life of {self.address} for {silent:.1f} s: {said}")
        return heard

    def data(self, request: pb.DataRequest, seconds: float) -> pb.DataReply:
        """Ask the lead for samples.

        Raises:
            Unreachable: ``interrupt`` was called meanwhile.
            ServerStopped: SIGTERM came while the request was allowed to wait.
        """
        method = self._channel.unary_unary(
            channel.method("Data"), pb.DataRequest.SerializeToString, pb.DataReply.FromString
        )
        before = self._interrupts

        def attempt(left: float) -> pb.DataReply:
            call = method.future(request, timeout=left, metadata=self._access.metadata)
            self._begin(call, before)
            try:
                with graceful_shutdown.interruptible(call.cancel) if request.wait else contextlib.nullcontext():
                    reply: pb.DataReply = call.result()
                    return reply
            except grpc.FutureCancelledError:
                if call not in self._interruptible:
                    raise self._interrupted() from None
                raise ServerStopped(f"the wait for samples of server {self.address} was given up") from None
            finally:
                self._interruptible.discard(call)

        return self._until_read(attempt, seconds)

    def _begin(self, call: Any, before: int) -> None:
        """Let ``interrupt`` end a call that has begun at ``before`` interrupts, also if one has come since."""
        self._interruptible.add(call)
        if self._interrupts != before:
            self._interruptible.discard(call)
            call.cancel()

    def interrupt(self) -> None:
        """End the calls that wait for samples or a roster: their server does not answer any more."""
        self._interrupts += 1
        for call in tuple(self._interruptible):
            self._interruptible.discard(call)
            call.cancel()

    def _interrupted(self) -> Unreachable:
        return Unreachable(f"server {self.address} does not answer; another one may")

    def trace(self, request: pb.TraceRequest, seconds: float) -> pb.TraceReply:
        """Read the lead's clock, and send it spans if the request has any."""
        return self._unary("Trace", request, pb.TraceReply, seconds)

    def leave(self, request: pb.LeaveRequest, seconds: float) -> pb.LeaveReply:
        """Leave the roster."""
        return self._unary("Leave", request, pb.LeaveReply, seconds)

    def status(self, seconds: float) -> pb.StatusReply:
        """Ask the shard for its status.

        Raises:
            Unreachable: nothing answers within ``seconds``.
            Refused: TLS is not right; says which side and what.
        """
        try:
            return self._unary("Status", pb.StatusRequest(version=version.current()), pb.StatusReply, seconds)
        except Unreachable:
            self._check_tls(seconds)
            raise

    def _check_tls(self, seconds: float) -> None:
        """Find out whether a connection has failed because of TLS, which gRPC does not tell.

        Raises:
            Refused: it has; says which side and what.
        """
        if wrong := tls_probe.explain_failure(self.address, self._access.tls, min(PROBE_SECONDS, seconds)):
            raise Refused(wrong)

    def commit(self, message: bytes) -> None:
        """Send copies of pushes over the connection of the heartbeats. Does not wait, and whatever fails is no matter.

        Args:
            message: frames of Hello and of the pushes, joined.
        """
        call: Any = self._heartbeat_channels[0].stream_unary(channel.method("Commit"), None, None)
        self._committing = call.future(iter((message,)), timeout=COMMIT_SECONDS, metadata=self._access.metadata)

    def seed(self, frames: Callable[[], Iterable[bytes]], seconds: float) -> None:
        """Send the shard its first parameters.

        Args:
            frames: function that makes the frames of ``Identity.seeds``, for each try anew.
            seconds: longest time for all tries.
        """
        call: Callable[..., Any] = self._channel.stream_unary(channel.method("Seed"), None, pb.SeedReply.FromString)
        self._until_read(lambda left: call(iter(frames()), timeout=left, metadata=self._access.metadata), seconds)

    def rosters(self, seconds: float) -> Iterator[pb.RosterView]:
        """Every roster of the lead, the current one first.

        Raises:
            WaitTimeout: ``seconds`` are over.
            Unreachable: ``interrupt`` was called meanwhile.
            ServerStopped: the lead was told to stop, or SIGTERM came here.
        """
        watch = self._channel.unary_stream(
            channel.method("WatchRoster"), pb.WatchRequest.SerializeToString, pb.RosterView.FromString
        )
        before = self._interrupts
        call: Any = watch(pb.WatchRequest(), timeout=seconds, metadata=self._access.metadata)
        self._begin(call, before)
        try:
            with graceful_shutdown.interruptible(call.cancel):
                for view in call:
                    if view.stopped:
                        raise ServerStopped(view.stopped)
                    yield view
        except grpc.RpcError as failure:
            if call not in self._interruptible:
                raise self._interrupted() from None
            if call.cancelled():
                raise ServerStopped(f"the wait for workers of server {self.address} was given up") from None
            raise error_of(failure, str(self.address)) from None
        finally:
            self._interruptible.discard(call)
            call.cancel()

    def close(self) -> None:
        for each in self._heartbeat_channels:
            each.close()

    def _unary(
        self,
        name: str,
        request: Message,
        reply: type[Reply],
        seconds: float,
        *,
        wait: bool = False,
        over: grpc.Channel | None = None,
    ) -> Reply:
        call: Callable[..., Reply] = (over or self._channel).unary_unary(
            channel.method(name), type(request).SerializeToString, reply.FromString
        )
        attempt = functools.partial(call, request, wait_for_ready=wait, metadata=self._access.metadata)
        return self._until_read(lambda left: attempt(timeout=left), seconds)

    def _until_read(self, attempt: Callable[[float], Answer], seconds: float) -> Answer:
        """Make a call, and again for ``seconds`` where the server drops it unread.

        Args:
            attempt: function that makes one try, with its deadline in seconds.
            seconds: deadline of all tries together.
        """
        deadline, left = time.monotonic() + seconds, seconds
        while True:
            try:
                return attempt(left)
            except grpc.RpcError as failure:
                left = deadline - time.monotonic() - RETRY_SECONDS
                if left <= 0 or not is_unread(failure):
                    raise error_of(failure, str(self.address)) from None
            except ValueError:  # gRPC raises it in a thread that looks for a server while another one closes the link
                raise Unreachable(f"the connection to {self.address} is closed here") from None
            time.sleep(RETRY_SECONDS)
