"""Which jobs this process takes part in: a job trains one model, so each of its models needs a job of its own.

    $PS_SERVERS = gen=host:1;critic=host:2     first optimizer --> gen, second --> critic
                                               after a close() --> the job that is free

Rules of this file
  1. The k-th model of a process takes the k-th job of the list, so every worker has to make its optimizers in one
     order, or to name their jobs. A job is free again when its optimizer is closed, or dropped and collected.
  2. A model that would land on a taken job is refused before a server hears of it: in async mode nothing else would
     show that two models of one shape have become one. A second worker in one process, as of a test with threads, says
     that it is one by a name or a rank of its own.
  3. An optimizer that takes the place of a former one, as in the cell of a notebook that is run again, closes it.
"""

import gc
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.wire.job_servers import JobServers

log = logging.getLogger("torch_ps.worker")

_lock = threading.RLock()


class Member(Protocol):
    """An optimizer."""

    def close(self) -> None:
        """Leave the job."""


class Trains(Protocol):
    """What an optimizer trains."""

    def replaced_by(self, other: Any) -> bool:
        """Whether an optimizer of ``other`` takes the place of the optimizer of this."""


class _Taken(NamedTuple):
    """A job that a member of this process takes part in.

    Attributes:
        job: servers of the job.
        worker: name of the worker.
        own_name: whether the caller has named or ranked the worker.
        process: number of the process that has joined.
        trains: what the member trains.
    """

    job: JobServers
    worker: str
    own_name: bool
    process: int
    trains: Trains


_taken: "weakref.WeakKeyDictionary[Member, _Taken]" = weakref.WeakKeyDictionary()


def choose_job(jobs: Sequence[JobServers], job: str, worker: str, *, own_name: bool, trains: Trains) -> JobServers:
    """The job that a new model of this process trains in. Optimizers whose place the new one takes are closed.

    Args:
        jobs: jobs that there are servers for.
        job: name of the job that is wanted; "" takes the first that no other model of this process is in.
        worker: name of the worker.
        own_name: whether the caller has named or ranked this worker, so that it may be a second one of a job.
        trains: modules that the new optimizer trains.

    Raises:
        ConfigError: there is no such job, or another model of this process is in it; says what to do.
    """
    wanted = [each for each in jobs if each.name == job] if job else list(jobs)
    if not wanted:
        names = ", ".join(each.name for each in jobs)
        raise ConfigError(
            f"there is no job {job!r} among the servers, which are those of {names or 'one job without a name'}; give "
            "--models NAME,NAME to ps-run or ps-serve"
        )
    for each in wanted:
        _close_former(each, worker, own_name=own_name, trains=trains)
    found = _free(wanted, worker, own_name=own_name)
    if found is None:
        gc.collect()  # an optimizer that was dropped without close() may wait for it
        found = _free(wanted, worker, own_name=own_name)
    if found is not None:
        return found
    others = ", ".join(f"{each.title} as worker {_in(each, worker, own_name=own_name)}" for each in wanted)
    raise ConfigError(
        f"this process already trains another model in {others}, and a job trains one model: give each model servers "
        f"of its own with ps-run --models {len(jobs) + 1} or ps-serve --models NAME,NAME,...; optimizers take them in "
        "turn, or by job=NAME. If this optimizer is to replace the former one, call close() on that first"
    )


def _free(wanted: Sequence[JobServers], worker: str, *, own_name: bool) -> JobServers | None:
    return next((each for each in wanted if not _in(each, worker, own_name=own_name)), None)


def _in(job: JobServers, worker: str, *, own_name: bool) -> str:
    """Name of the worker of this process that is in the way of ``worker`` in this job; "" if none is."""
    return next((taken.worker for _, taken in _in_the_way(job, worker, own_name=own_name)), "")


def _in_the_way(job: JobServers, worker: str, *, own_name: bool) -> list[tuple[Member, _Taken]]:
    servers = {server for shard in job.shards for server in shard}
    with _lock:
        return [
            (member, taken)
            for member, taken in _taken.items()
            if taken.process == os.getpid()
            and servers & {server for shard in taken.job.shards for server in shard}
            and (taken.worker == worker or not own_name)
        ]


def _close_former(job: JobServers, worker: str, *, own_name: bool, trains: Trains) -> None:
    """Close the optimizers of this job whose place the new one takes: a synchronous step would wait for them."""
    for member, taken in _in_the_way(job, worker, own_name=own_name):
        if not taken.trains.replaced_by(trains):
            continue
        log.warning(
            "worker %s of %s is closed, as this process makes another optimizer in its place; the job goes on with the "
            "servers' parameters: start the servers anew to begin with those of the model",
            taken.worker,
            taken.job.title,
        )
        try:
            member.close()
        except PsError as error:
            log.warning("the last step of worker %s is not complete: %s", taken.worker, error)


def enter_job(member: Member, job: JobServers, worker: str, *, own_name: bool, trains: Trains) -> None:
    """Note that ``member``, an optimizer of this process, takes part in ``job`` as ``worker``; see ``choose_job``."""
    with _lock:
        _taken[member] = _Taken(job, worker, own_name, os.getpid(), trains)


def leave_job(member: Member) -> None:
    """Note that ``member`` takes part in no job any more."""
    with _lock:
        _taken.pop(member, None)


def members_here() -> list[Any]:
    """The optimizers of this process that take part in a job, oldest first."""
    with _lock:
        return [member for member, taken in _taken.items() if taken.process == os.getpid()]


def companions_of(member: Member) -> list[Member]:
    """The members of this process that are the same worker in other jobs, oldest first."""
    with _lock:
        mine = _taken.get(member)
        if mine is None:
            return []
        return [
            other
            for other, taken in _taken.items()
            if taken.process == os.getpid()
            and taken.job != mine.job
            and (taken.worker == mine.worker or not (taken.own_name or mine.own_name))
        ]
