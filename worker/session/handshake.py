"""Before a session: checks that all shards are one job's, in order, and have what this worker needs; joins the job."""

import logging
import time
from collections.abc import Callable, Collection, Sequence

from torch_ps.common.errors import ConfigError, NameTaken, Overloaded, ServerStopped, WaitTimeout
from torch_ps.common.options.worker_config import PLANES
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.port_proof import MAX_CONNECTIONS
from torch_ps.worker.transport.call_retry import call_with_retry
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers
from torch_ps.worker.transport.wait_reasons import advise_timeout

log = logging.getLogger("torch_ps.worker")

#: Seconds after which a lead that took no more workers is asked again.
OVERLOADED_PAUSE_SECONDS = 2.0
#: Seconds after which shards that are of different incarnations are asked again.
INCARNATION_PAUSE_SECONDS = 0.2


def check_arguments(timeout: float, plane: str, connections: int) -> None:
    """Check the arguments of a session.

    Raises:
        ConfigError: an argument is wrong; says which.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout must be > 0 seconds; got {timeout}")
    if plane not in PLANES:
        raise ConfigError(f"plane must be one of {', '.join(PLANES)}; got {plane!r}")
    if not 1 <= connections <= MAX_CONNECTIONS:
        raise ConfigError(f"connections must be between 1 and {MAX_CONNECTIONS}; got {connections}")


def describe_all(
    shards: Sequence[ShardServers], codecs: Collection[str], seconds: float, before: pb.JobDescription | None = None
) -> pb.JobDescription:
    """Ask all shards to describe their job until they fit together and are of one incarnation.

    Args:
        shards: servers of every shard, shard 0 first.
        codecs: names of the codecs that this worker will use.
        seconds: time for all answers together; the lease if that is longer.
        before: description of the job when this worker joined; None if it has not.

    Returns:
        What the lead says of the job.

    Raises:
        ConfigError: the addresses are not those of one job's shards in order, or a shard lacks a codec.
        Unreachable: a server does not answer.
        ServerStopped: the servers were started after ``before``, and not from a checkpoint.
        WaitTimeout: some servers are still of another incarnation than the lead; says which.
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
        time.sleep(INCARNATION_PAUSE_SECONDS)


def _check(links: Sequence[Link], jobs: Sequence[pb.JobDescription], codecs: Collection[str]) -> None:
    """Check order, clip norm and codecs of all shards, as ``describe_all`` says."""
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
    """Call ``join``, and again from its beginning if a server that has a standby goes away meanwhile.

    Args:
        join: function that performs the whole join.
        shards: servers of every shard, shard 0 first.
        lease: length of a lease in seconds.

    Raises:
        PsError: the error of the last ``join``.
    """
    if any(len(shard.servers) > 1 for shard in shards):
        call_with_retry(
            join, shards[0].patience(lease), then=(NameTaken,)
        )  # until that stream of this worker's has ended
    else:
        join()


def join_with_retry(lead: Link, request: pb.JoinRequest, seconds: float) -> pb.JoinReply:
    """Send Join to the lead, and again while it takes no more workers at the moment.

    Raises:
        Overloaded: the lead still takes no more after ``seconds``.
        PsError: the lead refuses for another reason.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return lead.join(request, max(deadline - time.monotonic(), 0.1))
        except Overloaded as error:
            if time.monotonic() + OVERLOADED_PAUSE_SECONDS > deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(OVERLOADED_PAUSE_SECONDS)


def wait_for_quorum(lead: ShardServers, job: pb.JobDescription, seconds: float) -> pb.RosterView:
    """Wait until the first quorum of workers is complete; returns the roster of the lead.

    Args:
        lead: servers of shard 0.
        job: description of the job.
        seconds: longest time to wait.

    Raises:
        WaitTimeout: workers are missing after ``seconds``; says how many, and who is there.
        Unreachable: the lead is gone and no other server serves in its place.
    """
    here: list[str] = []
    deadline = time.monotonic() + seconds

    def watch_roster() -> pb.RosterView | None:
        try:
            for view in lead.link.rosters(max(deadline - time.monotonic(), 0.1)):
                if view.open:
                    return view
                here[:] = [member.worker for member in view.member]
        except WaitTimeout:
            pass
        return None

    if view := call_with_retry(watch_roster, lead.patience(job.lease_seconds)):
        return view
    raise WaitTimeout(
        f"after {seconds:g} s {job.quorum - len(here)} of {job.quorum} workers have not joined the job; "
        f"{', '.join(here) or 'nobody'} did{advise_timeout(seconds)}"
    )
