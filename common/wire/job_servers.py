"""The servers of one job or of several: the text of ``$PS_SERVERS`` and of an argument ``servers``.

    host:1,host:2                            one job of two shards
    gen=host:1,host:2;critic=host:3|host:4   two jobs with names; the shard of the second has a standby

Rules of this file
  1. A job trains one model, so a process with several models needs several jobs; ``ps-serve --models`` starts them.
  2. A list of jobs without names is in the order of the models: ``host:1;host:2`` are model0 and model1.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch_ps.common.errors import ConfigError
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class JobServers(NamedTuple):
    """The servers of one job.

    Attributes:
        name: name of the job; "" where a text names one job without a name.
        shards: addresses of the servers of each shard.
    """

    name: str
    shards: tuple[tuple[Address, ...], ...]

    @property
    def title(self) -> str:
        """The job in a sentence: its name, or the address of its first server."""
        return f"job {self.name}" if self.name else f"the job at {self.shards[0][0]}"


def check_name(name: str) -> str:
    """Return ``name`` if a job, and so a folder of checkpoints, can have it.

    Raises:
        ConfigError: the name has other characters, or is empty.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a job's name must be letters, digits, '.', '_' or '-', at most 64; got {name!r}")
    return name


def default_name(index: int) -> str:
    """The name of job ``index``, from 0, of several that nobody has named."""
    return f"model{index}"


def parse_jobs(text: str) -> tuple[JobServers, ...]:
    """Read the servers of one job or of several.

    Raises:
        ConfigError: an address or a name is malformed or repeated, or there is none; quotes the text.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    jobs: list[JobServers] = []
    for index, part in enumerate(parts or [text]):
        name, equals, servers = part.rpartition("=")
        if equals:
            name = check_name(name.strip())
        elif len(parts) > 1:
            name = default_name(index)
        if any(job.name == name for job in jobs):
            raise ConfigError(f"a list of servers must name each job once; {name} stands twice in {text!r}")
        jobs.append(JobServers(name, address.parse_servers(servers)))
    if len(jobs) > 1:  # a server serves one job
        address.parse_list(",".join(str(each) for job in jobs for shard in job.shards for each in shard))
    return tuple(jobs)


def format_jobs(jobs: Sequence[JobServers]) -> str:
    """The inverse of ``parse_jobs``."""
    texts = [",".join("|".join(map(str, shard)) for shard in job.shards) for job in jobs]
    return ";".join(f"{job.name}={text}" if job.name else text for job, text in zip(jobs, texts, strict=True))
