"""Record of the job that a checkpoint folder belongs to, and what another job may conclude from it. Pure functions.

    owner.json    {"format", "job", "incarnation", "token", "host", "address", "machine", "pid", "ticks", "since",
                   "beat", "ended"}

The lead of the job writes the record and raises ``beat`` every few seconds until it ends. A lead that finds the record
of another start of the servers decides by ``verdict``:

    TAKE      the former owner has ended, or it is this very job (a standby that takes over): the folder is free
    REFUSE    the former owner lives, or the folder is that of a job with another name
    WATCH     it may live on another machine or in another container: only a beat that stands still shows the opposite

Rules of this file
  1. No clock and no files: whether a process of this machine lives is an argument.
  2. A record that cannot be read is no free folder.

Source: leases as in Gray and Cheriton, SOSP 1989, without clocks: who waits counts the beats.
"""

import dataclasses
import enum
import json
import time
from dataclasses import dataclass

from torch_ps.common.errors import CheckpointError

FORMAT = "torch-ps owner 1"
#: Largest record that is read, in bytes.
MAX_BYTES = 1 << 16
#: Seconds since 1970 that a record may name, not included; beyond, the system knows no date.
MAX_SINCE = 1 << 37


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One lead that writes checkpoints.

    Attributes:
        job: Name of the job; "" if it has none.
        incarnation: Start of the servers that the lead belongs to; a standby keeps it when it takes over.
        token: Random name of the process.
        host: Name of its host.
        address: "HOST:PORT" that it listens on.
        machine: Boot and process namespace in which ``pid`` is valid.
        pid: Process id.
        ticks: Start of that process, as the kernel counts; tells it from a later one of the same id.
        since: Start of the ownership in seconds since 1970, for people.
        beat: Number of renewals.
        ended: Whether the job has ended in order.
    """

    job: str
    incarnation: int
    token: str
    host: str
    address: str
    machine: str
    pid: int
    ticks: int
    since: int
    beat: int = 0
    ended: bool = False

    def __str__(self) -> str:
        name = f"job {self.job!r}, " if self.job else ""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since))
        return f"{name}server {self.address}, process {self.pid} on host {self.host}, since {since}"


class Verdict(enum.Enum):
    """What a lead does about the record that it finds."""

    TAKE = "take"
    REFUSE = "refuse"
    WATCH = "watch"


def verdict(found: Owner | None, mine: Owner, *, alive: bool | None) -> Verdict:
    """Decide about a folder with the record ``found``; None: it has no record.

    Args:
        alive: Whether the process of ``found`` lives; None if that cannot be told from here.
    """
    if found is None or found.incarnation == mine.incarnation:
        return Verdict.TAKE
    if found.job and mine.job and found.job != mine.job:
        return Verdict.REFUSE
    if found.ended:
        return Verdict.TAKE
    if alive is None:  # the same host name and address prove nothing: containers of two machines may have both
        return Verdict.WATCH
    return Verdict.REFUSE if alive else Verdict.TAKE


def dump(owner: Owner) -> bytes:
    return json.dumps({"format": FORMAT, **dataclasses.asdict(owner)}, indent=1).encode() + b"\n"


def parse(data: bytes, place: str) -> Owner:
    """Read a record.

    Args:
        place: Name of its file, for the message.

    Raises:
        CheckpointError: It is no record of this format.
    """
    try:
        fields = json.loads(data)
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        owner = Owner(**fields)
        for field in dataclasses.fields(Owner):
            if type(getattr(owner, field.name)) is not field.type:
                raise TypeError(field.name)
        if not 0 <= owner.since < MAX_SINCE:
            raise ValueError("since")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{place} does not say whose these checkpoints are: it is damaged, or of another version of torch-ps; "
            "remove it if no other job writes there"
        ) from None
    return owner
