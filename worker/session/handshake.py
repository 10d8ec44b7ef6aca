"""The first questions: are all shards one job's, in order, able to do what this worker asks, and do they let it in?"""

import logging
import time
from collections.abc import Callable, Collection, Sequence

from torch_ps.common.errors import ConfigError, NameTaken, Overloaded, ServerStopped, WaitTimeout
from torch_ps.common.options.config import PLANES
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.retry import call_with_retry
from torch_ps.worker.transport.shard_servers import ShardServers

log = logging.getLogger("torch_ps.worker")

#: Seconds after which a lead that took no more workers is asked again.
AGAIN_SECONDS = 2.0
#: Seconds after which shards that are not of one start yet are asked again.
SHARDS_SECONDS = 0.2


def check_arguments(timeout: float, plane: str) -> None:
    """Refuse what no session can be made with.

    Raises:
        ConfigError: says what.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout must be > 0 seconds; got {timeout}")
    if plane not in PLANES:
        raise ConfigError(f"plane must be one of {', '.join(PLANES)}; got {plane!r}")


def describe_all(
    shards: Sequence[ShardServers], codecs: Collection[str], seconds: float, before: pb.JobDescription | None = None
) -> pb.JobDescription:
    """What the lead says of the job, once all shards have answered, fit together and are of one incarnation.

    Args:
        voters: of all shards, shard 0 first.
        codecs: that this worker will use.
        seconds: for all answers together, or the lease if that is longer.
        before: what it said when this worker joined.

    Raises:
        ConfigError: the addresses are not those of one job's shards in order, or a shard lacks a codec.
        Unreachable: a server does not answer.
        ServerStopped: the servers have been started since ``before``, and not from a checkpoint.
        WaitTimeout: some servers are still of another start than the lead; says which.
    """
    seconds = max(seconds, before.lease_seconds if before is not None else 0.0)
    deadline = time.monotonic() + seconds
    links = [shard.link for shard in shards]
    while True:
        jobs = [shard.describe(max(deadline - time.monotonic(), 0.1)) for shard in shards]
        _check(links, jobs, codecs)
        apart = [link for link, job in zip(links, jobs, strict=True) if job.incarnation != jobs[0].incarnation]
        if not apart:
            _check_resumed(jobs[0], before)
            return jobs[0]
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"after {seconds:g} s {', '.join(str(link.address) for link in apart)} and the lead at "
                f"{links[0].address} are not of one start of the servers: start all of them together, with --resume if "
                "there is a checkpoint"
            )
        time.sleep(SHARDS_SECONDS)


def _check(links: Sequence[Link], jobs: Sequence[pb.JobDescription], codecs: Collection[str]) -> None:
    """Raises ConfigError as ``describe_all`` does."""
    for index, (link, job) in enumerate(zip(links, jobs, strict=True)):
        if (job.shard, job.num_shards) != (index, len(jobs)):
            raise ConfigError(
                f"{link.address} is shard {job.shard} of {job.num_shards}, but stands as shard {index} of "
                f"{len(jobs)} in the list of servers; list all shards of one job, shard 0 first"
            )
        if job.clip_norm != jobs[0].clip_norm:
            raise ConfigError(
                f"{link.address} was started with clip norm {job.clip_norm:g}, shard 0 with {jobs[0].clip_norm:g}; "
                "give all shards the same --clip-norm"
            )
        for codec in codecs:
            if codec.partition(":")[0] not in job.codec:
                raise ConfigError(f"{link.address} has no codec {codec!r}; start ps-serve with --codecs MODULE too")


def _check_resumed(job: pb.JobDescription, before: pb.JobDescription | None) -> None:
    if before is not None and job.incarnation != before.incarnation and not job.initialised:
        raise ServerStopped(
            "the servers were started anew and hold nothing of the job that this worker took part in; start them with "
            "the --checkpoint of that job and --resume, or begin anew with new workers"
        )


def retry_join(join: Callable[[], None], shards: Sequence[ShardServers], lease: float) -> None:
    """Do what it takes to join; again from its beginning when a server that has a standby goes away meanwhile.

    Raises:
        PsError: as ``join``.
    """
    if any(len(shard.servers) > 1 for shard in shards):
        call_with_retry(
            join, shards[0].patience(lease), then=(NameTaken,)
        )  # until that stream of this worker's has ended
    else:
        join()


def join_with_retry(lead: Link, request: pb.JoinRequest, seconds: float) -> pb.JoinReply:
    """Join; where the lead takes no more at the moment, it is asked again.

    Raises:
        Overloaded: it still takes no more after ``seconds``.
        PsError: what else it says.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return lead.join(request, max(deadline - time.monotonic(), 0.1))
        except Overloaded as error:
            if time.monotonic() + AGAIN_SECONDS > deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(AGAIN_SECONDS)


def wait_for_quorum(shard_servers: ShardServers, job: pb.JobDescription, seconds: float) -> pb.RosterView:
    """The roster of the lead, once the first quorum of workers is complete.

    Args:
        voter: of the lead.

    Raises:
        WaitTimeout: workers are missing after ``seconds``; says how many, and who is there.
        Unreachable: nobody serves in the place of a lead that is gone.
    """
    here: list[str] = []
    deadline = time.monotonic() + seconds

    def first() -> pb.RosterView | None:
        try:
            for view in shard_servers.link.rosters(max(deadline - time.monotonic(), 0.1)):
                if view.open:
                    return view
                here[:] = [member.worker for member in view.member]
        except WaitTimeout:
            pass
        return None

    if view := call_with_retry(first, shard_servers.patience(job.lease_seconds)):
        return view
    raise WaitTimeout(
        f"after {seconds:g} s {job.quorum - len(here)} of {job.quorum} workers have not joined the job; "
        f"{', '.join(here) or 'nobody'} did"
    )
