"""The first questions: are all shards one job's, in order, able to do what this worker asks, and do they let it in?"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from torch_ps.common import codecs as table
from torch_ps.common import schema
from torch_ps.common.errors import ConfigError, Overloaded, Unreachable, WaitTimeout
from torch_ps.common.frames import pack
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.worker.transport import Link
from torch_ps.worker.voter import Voter

log = logging.getLogger("torch_ps.worker")

#: Seconds after which a lead that took no more workers is asked again.
AGAIN_SECONDS = 2.0
#: Seconds after which all servers are looked at again.
PAUSE_SECONDS = 0.2


def describe_all(links: Sequence[Link], codecs: Iterable[str], seconds: float) -> pb.JobDescription:
    """What the lead says of the job, once all shards have answered and fit together.

    Args:
        links: to all shards, shard 0 first.
        codecs: that this worker will use.
        seconds: for all answers together.

    Raises:
        ConfigError: the addresses are not those of one job's shards in order, or a shard lacks a codec.
        Unreachable: a server does not answer.
    """
    deadline = time.monotonic() + seconds
    jobs = [link.describe(max(deadline - time.monotonic(), 0.1)) for link in links]
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
    return jobs[0]


def find_servers(voters: Sequence[Voter], worker: str, session: int, seconds: float) -> None:
    """Where a shard has several servers, have its link lead to the one that serves.

    Raises:
        Unreachable: none does after ``seconds``; names them.
    """
    deadline = time.monotonic() + seconds
    for voter in voters:
        while len(voter.servers) > 1 and not voter.look(worker, session):
            if time.monotonic() > deadline:
                names = " and ".join(map(str, voter.servers))
                raise Unreachable(f"none of {names} serves its shard after {seconds:g} s; see their logs")
            time.sleep(PAUSE_SECONDS)


def admitted(lead: Link, request: pb.JoinRequest, seconds: float) -> pb.JoinReply:
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


def seeds(
    worker: str, session: int, model: Model, buckets: Iterable[Bucket], values: Callable[[Bucket], torch.Tensor]
) -> Iterator[bytes]:
    """The frames that give one shard, which has ``buckets``, its first parameters; ``values`` of one, fp32 (numel,)."""
    yield pack(pb.SeedHeader(worker=worker, session=session, model=schema.to_proto(model)))
    for bucket in buckets:
        yield pack(pb.SeedHeader(bucket=bucket.index), table.codec("none").encode(values(bucket)))


def open_roster(lead: Link, quorum: int, seconds: float) -> pb.RosterView:
    """The roster of the lead, once the first ``quorum`` of workers is complete.

    Raises:
        WaitTimeout: workers are missing after ``seconds``; says how many, and who is there.
    """
    here: list[str] = []
    try:
        for view in lead.rosters(seconds):
            if view.open:
                return view
            here = [member.worker for member in view.member]
    except WaitTimeout:
        pass
    raise WaitTimeout(
        f"after {seconds:g} s {quorum - len(here)} of {quorum} workers have not joined the job; "
        f"{', '.join(here) or 'nobody'} did"
    )
