"""Registration of another shard with the lead, before it listens and reads a checkpoint: both ends.

start --> Enter, a secret --> lead: is the place free? --> number of the incarnation, version that the lead went on from
later --> a call, the secret --> lead: is this the process in that place?
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from torch_ps.common import version
from torch_ps.common.errors import Overloaded, Refused, Restarted, Unreachable, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.rpc.status import error_of
from torch_ps.common.security import tls_probe
from torch_ps.common.wire.address import Address
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.job.speakers import digest_of, shows

log = logging.getLogger("torch_ps.ps")

#: Seconds in which the lead has to come up and read its part of a checkpoint.
LEAD_SECONDS = 300.0
#: Seconds between two attempts.
RETRY_SECONDS = 0.5
#: Seconds for the probe that finds out why TLS fails at the lead's port.
PROBE_SECONDS = 3.0


class Registrar:
    """On the lead: takes processes in the places of the other shards.

    Args:
        on_restart: Called when a shard was started alone, to end this start of the servers; None goes on without it.
    """

    def __init__(self, incarnation: Incarnation, on_restart: Callable[[Restarted], None] | None) -> None:
        self._incarnation, self._on_restart = incarnation, on_restart

    def register(self, shard: int, num_shards: int, secret: bytes, host: str) -> None:
        """Give the process with this secret the place of a shard; to ask again changes nothing.

        Args:
            host: Where the process runs.

        Raises:
            ProtocolError: This server is not the lead, or the secret is not one.
            ConfigError: There is no such shard.
            Restarted: The shard was started alone, and this start of the servers ends for that: it has to ask again.
            Overloaded: Too many processes have entered as this shard lately.
            Refused: The shard was started alone, and the servers go on.
        """
        try:
            self._incarnation.enter(shard, num_shards, digest_of(secret, f"shard {shard}"), host, time.monotonic())
        except Overloaded:
            raise
        except Refused:
            if self._on_restart is None:
                raise
            error = Restarted(f"shard {shard} was started anew, so all servers have to start together again")
            self._on_restart(error)
            raise error from None

    @contextmanager
    def following(self, shard: int, secret: bytes) -> Iterator[None]:
        """Keep the place of a shard that follows the lead, for as long as the context lasts.

        Whoever has not entered keeps nothing, and may follow like a worker.
        """
        digest = digest_of(secret, f"shard {shard}") if secret else ""
        entered = self._incarnation.follow(shard, digest)
        try:
            yield
        finally:
            if entered:
                self._incarnation.unfollow(shard, digest, time.monotonic())

    def check(self, shard: int, secret: bytes) -> None:
        """Refuse a call in the name of a shard that is not that shard's.

        Raises:
            Refused: No process with this secret has entered as this shard.
        """
        if not any(shows(secret, digest) for digest in self._incarnation.digests.get(shard, ())):
            raise Refused(f"this is not shard {shard} of the job: no process with its secret has entered at the lead")


async def register(lead: Address, shard: int, num_shards: int, secret: bytes, access: Access) -> pb.EnterReply:
    """Take the place of ``shard`` at the lead; wait until the lead answers.

    Args:
        secret: Secret of this process, which it shows with every later call to the lead.

    Raises:
        Refused: Another process had the place and its state is lost; the message says what to do.
        ConfigError: The lead's job has another number of shards.
        Unreachable: TLS fails; the message says why.
        WaitTimeout: The lead has not come up within ``LEAD_SECONDS``.
    """
    request = pb.EnterRequest(shard=shard, num_shards=num_shards, secret=secret, version=version.current())
    begin, told = time.monotonic(), False
    while True:
        left = begin + LEAD_SECONDS - time.monotonic()
        try:
            async with access.connect_aio(lead) as connection:
                call = connection.unary_unary(
                    channel.method("Enter"), pb.EnterRequest.SerializeToString, pb.EnterReply.FromString
                )
                reply: pb.EnterReply = await call(request, timeout=left, metadata=access.metadata)
                version.check(f"the lead at {lead}", reply.version, "this shard")
                return reply
        except grpc.aio.AioRpcError as error:
            failure = error_of(error, str(lead))
            if not isinstance(failure, Unreachable | WaitTimeout | Restarted | Overloaded):
                raise failure from None
        if reason := await asyncio.to_thread(tls_probe.explain_failure, lead, access.tls, PROBE_SECONDS):
            raise Unreachable(reason)
        if time.monotonic() - begin > LEAD_SECONDS:
            raise WaitTimeout(f"shard {shard} has waited for {LEAD_SECONDS:g} s for the lead: {failure}")
        if not told:
            log.warning("shard %d waits for the lead: %s", shard, failure)
            told = True
        await asyncio.sleep(RETRY_SECONDS)
