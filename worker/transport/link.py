"""The worker's end of the wire: one ``Link`` per shard, the calls that it can make, and which ``Stream`` it opens.

Rules of this file
  1. Nothing else of this folder knows gRPC, but for ``stream.py``.
  2. Every call has a deadline, and every failure comes out as an error of ``torch_ps.common.errors``.
  3. A connection that is made again is made with the certificates as they are then, and every call shows the token as
     it is then.
  4. A server that is stopped keeps its connections: where another one may take its place, a call that may take long is
     waited for only as long as the server shows signs of life.
  5. Signs of life go both ways over a connection of their own. On a slow link the other one is full for as long as a
     bucket takes, megabytes of it in buffers where nothing overtakes.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from torch_ps.common.errors import (
    NoSharedMemory,
    NotServing,
    PsError,
    Refused,
    ServerStopped,
    Unreachable,
    WaitTimeout,
)
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import OPEN, Access
from torch_ps.common.rpc.status import error_of
from torch_ps.common.security import tls_probe as probe
from torch_ps.common.wire.address import Address
from torch_ps.worker.runtime import graceful_shutdown as drain
from torch_ps.worker.transport.grpc_stream import GrpcStream, OnEnd, OnMessage
from torch_ps.worker.transport.unix_stream import UnixStream, connect

log = logging.getLogger("torch_ps.worker")
Reply = TypeVar("Reply", bound=Message)

#: Seconds in which a port has to show why a connection fails.
PROBE_SECONDS = 3.0
#: Seconds in which a server that is asked for a sign of life has to answer, at most.
SIGN_SECONDS = 1.0

_Ways = tuple[grpc.Channel, ...]


class Link:
    """The connection to one shard.

    Args:
        address: of the shard.
        access: how it is spoken to.
        plane: as that of ``Session``; "network" keeps off the server's Unix socket.

    Whoever found the server at another port than its own wants the stream to go through what stands between.

    Raises:
        ConfigError: the token would travel in the clear to another machine.
    """

    def __init__(self, address: Address, access: Access = OPEN, plane: str = "network") -> None:
        access.check(address)
        self.address, self._access, self._plane = address, access, plane
        self._socket = pb.SocketOffer()
        self._asks: set[Any] = set()  # calls
        self._interrupts = 0  # so far
        #: Another server may take this one's place.
        self.replaceable = False
        self._lease = 0.0
        self._connect()

    def _connect(self) -> None:
        self._mark = self._access.mark
        self._channel = self._access.connect(self.address)
        #: Of signs of life, the best first: a server that takes no more connections is still there.
        self._ways: _Ways = (self._access.connect(self.address, channel.APART), self._channel)

    def to(self, address: Address) -> None:
        """Lead to another server of the shard; calls that are under way end where they began."""
        self._access.check(address)
        if address != self.address or self._access.mark != self._mark:
            self.address = address
            self._connect()

    def look(self, seconds: float) -> pb.JobDescription:
        """What the server is, without the model; one try, which does not wait for it to come up."""
        return self._described(pb.DescribeRequest(), seconds)

    def ballot(self, request: pb.BallotRequest, seconds: float) -> pb.BallotReply:
        return self._unary("Ballot", request, pb.BallotReply, seconds)

    def open(self, on_message: OnMessage, on_end: OnEnd) -> GrpcStream | UnixStream:
        """Open an Exchange: over the server's Unix socket if it is on this host and nothing stands between."""
        if self._plane != "network" and self._socket.port == self.address.port:
            try:
                return UnixStream(connect(self._socket), self.address, on_message, on_end)
            except NoSharedMemory as error:
                log.info("the network carries all to and from %s: %s", self.address, error)
        return GrpcStream(self._exchange, self.address, on_message, on_end)

    def _exchange(self, frames: Iterator[bytes]) -> Any:
        """Open an Exchange, raw frames both ways."""
        call: Any = self._channel.stream_stream(channel.method("Exchange"), None, None)
        return call(frames, metadata=self._access.metadata)

    def describe(self, seconds: float) -> pb.JobDescription:
        """What the shard is, without the model; waits until it answers. A link that broke is made again by it.

        Raises:
            Unreachable: it did not within ``seconds``; names the address and the reason.
            Refused: TLS or the token is not right, which waiting would not change; says which side and what.
        """
        if self._access.mark != self._mark:
            self._connect()  # calls that are under way end on the connection that they began on
        request, deadline = pb.DescribeRequest(), time.monotonic() + seconds
        try:
            return self._described(request, seconds)
        except WaitTimeout:
            reason = "it takes the call and does not answer"
        except (Unreachable, ServerStopped):  # it may come up in time, unless what answers there will never do
            self._check_tls(seconds)
            try:
                left = max(deadline - time.monotonic(), 0.1)
                return self._described(request, left, wait=True)
            except WaitTimeout:
                reason = self._why()
        raise Unreachable(
            f"no server answers at {self.address} within {seconds:.3g} s ({reason}); "
            "check the address and that ps-serve runs there"
        )

    def _described(self, request: pb.DescribeRequest, seconds: float, *, wait: bool = False) -> pb.JobDescription:
        job = self._unary("Describe", request, pb.JobDescription, seconds, wait=wait)
        self._socket, self._lease = job.socket, job.lease_seconds
        return job

    def _why(self) -> str:
        """What goes wrong at this address; a call that waits for the server does not say, so ask without waiting."""
        try:
            self._unary("Describe", pb.DescribeRequest(), pb.JobDescription, 1.0)
        except PsError as error:
            return str(error)
        return "it has just begun to answer"

    def model(self, seconds: float) -> pb.Model:
        """What the shard trains, as soon as it has parameters."""
        return self._while_alive("Describe", pb.DescribeRequest(model=True), pb.JobDescription, seconds).model

    def join(self, request: pb.JoinRequest, seconds: float) -> pb.JoinReply:
        return self._while_alive("Join", request, pb.JoinReply, seconds)

    def share(self, request: pb.ShareRequest, seconds: float) -> pb.ShareReply:
        return self._while_alive("Share", request, pb.ShareReply, seconds)

    def _while_alive(self, name: str, request: Message, reply: type[Reply], seconds: float) -> Reply:
        """The answer to a call that may take long.

        Raises:
            Unreachable: no sign of life for a lease, and another server may take the place of this one.
        """
        method = self._channel.unary_unary(channel.method(name), type(request).SerializeToString, reply.FromString)
        ways, heard = self._ways, time.monotonic()  # to this server, wherever the link leads meanwhile
        call = method.future(request, timeout=seconds, metadata=self._access.metadata)
        try:
            while True:
                try:
                    answer: Reply = call.result(self._lease / 3 if self.replaceable else None)
                    return answer
                except grpc.FutureTimeoutError:
                    heard = self.sign(pb.RenewRequest(), heard, self._lease, ways)
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None
        finally:
            call.cancel()

    def sign(self, request: pb.RenewRequest, heard: float, seconds: float, over: _Ways | None = None) -> float:
        """Give a sign of life and ask for one; when there was one last, on ``time.monotonic()``, as ``heard`` is.

        Raises:
            Unreachable: none for ``seconds``.
        """
        begin, patience, said = time.monotonic(), min(SIGN_SECONDS, seconds / 3), ""
        for way in over or self._ways:
            try:
                self._unary("Renew", request, pb.RenewReply, patience, over=way)
            except (Unreachable, WaitTimeout, NotServing) as error:
                said = said or str(error)
            except PsError:  # whoever refuses lives; what it means is for others to find out
                return begin
            else:
                return begin
        silent = time.monotonic() - heard
        if silent > seconds:
            raise Unreachable(f"no sign of life of {self.address} for {silent:.1f} s: {said}")
        return heard

    def data(self, request: pb.DataRequest, seconds: float) -> pb.DataReply:
        """One ask, which ``interrupt`` ends with Unreachable; if it may wait, SIGTERM ends it with an error."""
        method = self._channel.unary_unary(
            channel.method("Data"), pb.DataRequest.SerializeToString, pb.DataReply.FromString
        )
        before = self._interrupts
        call = method.future(request, timeout=seconds, metadata=self._access.metadata)
        self._begin(call, before)
        try:
            with drain.waiting(call.cancel) if request.wait else contextlib.nullcontext():
                reply: pb.DataReply = call.result()
        except grpc.FutureCancelledError:
            if call not in self._asks:
                raise self._interrupted() from None
            raise ServerStopped(f"the wait for samples of server {self.address} was given up") from None
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None
        finally:
            self._asks.discard(call)
        return reply

    def _begin(self, call: Any, before: int) -> None:
        """Let ``interrupt`` end an ask that has just been sent, also one that came since there were ``before``."""
        self._asks.add(call)
        if self._interrupts != before:
            self._asks.discard(call)
            call.cancel()

    def interrupt(self) -> None:
        """End the asks that are under way: the server that they were sent to does not answer any more."""
        self._interrupts += 1
        for call in tuple(self._asks):
            self._asks.discard(call)
            call.cancel()

    def _interrupted(self) -> Unreachable:
        return Unreachable(f"server {self.address} does not answer; another one may")

    def trace(self, request: pb.TraceRequest, seconds: float) -> pb.TraceReply:
        return self._unary("Trace", request, pb.TraceReply, seconds)

    def leave(self, request: pb.LeaveRequest, seconds: float) -> pb.LeaveReply:
        return self._unary("Leave", request, pb.LeaveReply, seconds)

    def status(self, seconds: float) -> pb.StatusReply:
        try:
            return self._unary("Status", pb.StatusRequest(), pb.StatusReply, seconds)
        except Unreachable:
            self._check_tls(seconds)
            raise

    def _check_tls(self, seconds: float) -> None:
        """After a connection has failed: whether it is for a reason of TLS, which gRPC does not tell.

        Raises:
            Refused: it is; says which side and what.
        """
        if wrong := probe.explain_failure(self.address, self._access.tls, min(PROBE_SECONDS, seconds)):
            raise Refused(wrong)

    def seed(self, frames: Iterable[bytes], seconds: float) -> None:
        call: Callable[..., Any] = self._channel.stream_unary(channel.method("Seed"), None, pb.SeedReply.FromString)
        try:
            call(iter(frames), timeout=seconds, metadata=self._access.metadata)
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None

    def rosters(self, seconds: float) -> Iterator[pb.RosterView]:
        """Every roster of the lead, the current one first. SIGTERM ends it with an error, ``interrupt`` too.

        Raises:
            WaitTimeout: ``seconds`` are over.
        """
        watch = self._channel.unary_stream(
            channel.method("WatchRoster"), pb.WatchRequest.SerializeToString, pb.RosterView.FromString
        )
        before = self._interrupts
        call: Any = watch(pb.WatchRequest(), timeout=seconds, metadata=self._access.metadata)
        self._begin(call, before)
        try:
            with drain.waiting(call.cancel):
                yield from call
        except grpc.RpcError as failure:
            if call not in self._asks:
                raise self._interrupted() from None
            if call.cancelled():
                raise ServerStopped(f"the wait for workers of server {self.address} was given up") from None
            raise error_of(failure, str(self.address)) from None
        finally:
            self._asks.discard(call)
            call.cancel()

    def close(self) -> None:
        for way in self._ways:
            way.close()

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
        try:
            return call(request, timeout=seconds, wait_for_ready=wait, metadata=self._access.metadata)
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None
        except ValueError:  # what gRPC says to a thread that looks for a server while another one closes the link
            raise Unreachable(f"the connection to {self.address} is closed here") from None
