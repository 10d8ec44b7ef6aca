"""Which jobs this process takes part in: a job trains one model, so each of its models needs a job of its own.

    $PS_SERVERS = gen=host:1;critic=host:2     first optimizer --> gen, second --> critic
                                               after a close() --> the job that is free

Rules of this file
  1. The k-th model of a process takes the k-th job of the list, so every worker has to make its optimizers in one
     order, or to name their jobs. A job is free again when its optimizer is closed, or dropped and collected.
  2. A model that would land on a taken job is refused before a server hears of it: in async mode nothing else would
     show that two models of one shape have become one. A second worker in one process, as of a test with threads, says
     that it is one by a name or a rank of its own.
"""

import gc
import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from torch_ps.common.errors import ConfigError
from torch_ps.common.wire.job_servers import JobServers

_lock = threading.RLock()


class _Taken(NamedTuple):
    """A job that a member of this process takes part in.

    Attributes:
        job: servers of the job.
        worker: name of the worker.
        own_name: whether the caller has named or ranked the worker.
        process: number of the process that has joined.
    """

    job: JobServers
    worker: str
    own_name: bool
    process: int


_taken: "weakref.WeakKeyDictionary[object, _Taken]" = weakref.WeakKeyDictionary()


def choose_job(jobs: Sequence[JobServers], job: str, worker: str, *, own_name: bool) -> JobServers:
    """The job that a new model of this process trains in.

    Args:
        jobs: jobs that there are servers for.
        job: name of the job that is wanted; "" takes the first that no other model of this process is in.
        worker: name of the worker.
        own_name: whether the caller has named or ranked this worker, so that it may be a second one of a job.

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
    servers = {server for shard in job.shards for server in shard}
    with _lock:
        for taken in _taken.values():
            theirs = {server for shard in taken.job.shards for server in shard}
            if taken.process == os.getpid() and servers & theirs and (taken.worker == worker or not own_name):
                return taken.worker
    return ""


def enter_job(member: object, job: JobServers, worker: str, *, own_name: bool) -> None:
    """Note that ``member``, an optimizer of this process, takes part in ``job`` as ``worker``; see ``choose_job``."""
    with _lock:
        _taken[member] = _Taken(job, worker, own_name, os.getpid())


def leave_job(member: object) -> None:
    """Note that ``member`` takes part in no job any more."""
    with _lock:
        _taken.pop(member, None)


def companions_of(member: object) -> list[object]:
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
