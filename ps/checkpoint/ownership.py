"""Keeps other jobs out of the checkpoint folder of this one, in a folder as in an object store.

    lead:      claim() --> renewed every RENEW_SECONDS by a thread --> release()
    takeover:  start_claiming(): the same on that thread, claimed again until it succeeds
    others:    check() before each file that they write

Rules of this file
  1. One job writes below one URL. A second one is refused at its start with the words of whose it is. Where two come
     at once, or one was cut off and is alive all the same, the record says who has it: the other one writes no more.
  2. A crash of the owner locks nobody out: a process of this machine that is gone is known to be, and on another
     machine or in another container one is given up when its record has stood still for WATCH_SECONDS.
  3. A folder whose record is gone was removed, or its disk is not mounted: nothing is written there, and no folder is
     made, until the record is back.
"""

import contextlib
import dataclasses
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch_ps.common.errors import CheckpointError
from torch_ps.ps.checkpoint import owner
from torch_ps.ps.checkpoint.owner import Owner, Verdict
from torch_ps.ps.checkpoint.storage import FileMissing, Storage, cause

log = logging.getLogger("torch_ps.ps")

NAME = "owner.json"
#: Seconds between two renewals of the record, and for which it has to stand still before another job takes over.
RENEW_SECONDS, WATCH_SECONDS = 5.0, 20.0
#: Seconds between writing a record and reading it back, in an object store where two jobs may claim at once.
SETTLE_SECONDS = 0.5


class Ownership:
    """The place of this server's checkpoints in ``storage``. All methods block; callers have a thread for them.

    Args:
        incarnation: Start of the servers that this one belongs to.
        job: Name of the job; "" if it has none.
        address: "HOST:PORT" that this server listens on.
    """

    def __init__(self, storage: Storage, *, incarnation: int, job: str, address: str) -> None:
        self._storage = storage
        self._mine = Owner(
            job=job,
            incarnation=incarnation,
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            address=address,
            machine=_machine(),
            pid=os.getpid(),
            ticks=_ticks(os.getpid()),
            since=int(time.time()),
        )
        self._owns = False
        self._said = ""  # the last failure that was logged; "" after a success
        self._ended = threading.Event()
        self._writing = threading.Lock()  # two writers would share one partial file

    def claim(self) -> None:
        """Lead: make the folder that of this job and renew the record from now on.

        Raises:
            CheckpointError: It is that of another job, which lives or has another name; the message says whose. Or it
                cannot be written.
        """
        self._claim_once()
        self._start(self._renew_until_ended)

    def start_claiming(self) -> None:
        """Lead after a takeover: the same on a thread, again until it succeeds. Training does not wait for it."""
        self._start(self._claim_until_ended)

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="owner", daemon=True).start()

    def _claim_until_ended(self) -> None:
        while not self._ended.is_set():
            try:
                self._claim_once()
            except Exception as error:  # noqa: BLE001 - whatever a file system raises, training goes on
                self._tell("is not this server's yet, so another job may take it", error)
                self._ended.wait(RENEW_SECONDS)
            else:
                self._said = ""
                self._renew_until_ended()

    def _claim_once(self) -> None:
        found = self._read()
        decided = self._verdict(found)
        if decided is Verdict.WATCH and found is not None:
            found, decided = self._watch(found)
        if decided is Verdict.REFUSE and found is not None:
            raise self._refusal(found)
        with self._storage.exclusive():
            now = self._read()
            if now != found and now is not None and self._verdict(now) is not Verdict.TAKE:
                raise self._refusal(now)
            self._write(self._mine)
        if not self._storage.is_local:
            time.sleep(SETTLE_SECONDS)
            now = self._read()
            if now is not None and now.token != self._mine.token:
                raise self._refusal(now)
        self._owns = True

    def check(self) -> None:
        """Make sure that the folder is still that of this job, before something is written there.

        Raises:
            CheckpointError: It is that of another job, or the record is gone.
        """
        found = self._read()
        url, mine = self._storage.url, self._mine
        if found is None:
            raise CheckpointError(
                f"{url} has no {NAME} any more, so this is not the folder of before: mount its disk again if that is "
                "gone; nothing is written there meanwhile"
            )
        if found.incarnation != mine.incarnation or (self._owns and found.token != mine.token):
            raise CheckpointError(f"{url} belongs to another server now ({found}); this one writes no checkpoint there")

    def check_place(self) -> None:
        """At the start of another shard than the lead, or of a standby: see the record of this job's lead.

        Raises:
            CheckpointError: There is none; the place is another one than the lead's.
        """
        found = self._read()
        if found is None or found.incarnation != self._mine.incarnation:
            whose = f"it belongs to {found}" if found is not None else f"there is no {NAME}"
            raise CheckpointError(
                f"{self._storage.url} is not where the lead of this job writes its checkpoints ({whose}); all shards "
                "need the same --checkpoint, in a place that all of them see"
            )

    def release(self) -> None:
        """Say that the job has ended, so that the next one need not wait; errors only cost that."""
        self._ended.set()
        if self._owns:
            with contextlib.suppress(CheckpointError), self._writing:
                self.check()
                self._write(dataclasses.replace(self._mine, ended=True))

    def _watch(self, first: Owner) -> tuple[Owner | None, Verdict]:
        """Wait until the record of a job on another machine changes, or has stood still long enough."""
        log.warning(
            "%s belongs to another job (%s); it is taken over if that job does not renew its claim within %g s",
            self._storage.url,
            first,
            WATCH_SECONDS,
        )
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(RENEW_SECONDS / 5)
            found = self._read()
            if found != first:
                alive = found is not None and not found.ended
                return found, Verdict.REFUSE if alive else self._verdict(found)
        return first, Verdict.TAKE

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                with self._writing:
                    if self._ended.is_set():
                        return
                    self.check()
                    self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1)
                    self._write(self._mine)
                self._said = ""
            except CheckpointError as error:
                self._tell("does not take the renewal of this job's claim", error)

    def _tell(self, what: str, error: Exception) -> None:
        """Log a failure that is tried again, once for as long as it is the same."""
        if str(error) != self._said:
            self._said = str(error)
            log.warning("%s %s: %s; it is tried again every %g s", self._storage.url, what, error, RENEW_SECONDS)

    def _verdict(self, found: Owner | None) -> Verdict:
        return owner.verdict(found, self._mine, alive=_alive(found) if found is not None else False)

    def _refusal(self, found: Owner) -> CheckpointError:
        what = "" if found.ended else ", or end that one first"
        if not found.ended and found.job == self._mine.job:
            what += f"; if it has taken over from this server, start this one with --standby-of {found.address}"
        return CheckpointError(
            f"{self._storage.url} is the checkpoint folder of another job ({found}); give this job another "
            f"--checkpoint{what}"
        )

    def _read(self) -> Owner | None:
        try:
            data = self._storage.read(NAME, owner.MAX_BYTES)
        except FileMissing:
            return None
        return owner.parse(data, self._storage.place(NAME))

    def _write(self, record: Owner) -> None:
        try:
            self._storage.write(NAME, [owner.dump(record)])
        except Exception as error:  # noqa: BLE001  # fsspec's packages raise errors of their own
            raise CheckpointError(f"{self._storage.place(NAME)} cannot be written: {cause(error)}") from None


def _machine() -> str:
    """Boot and process namespace of this process; "" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _ticks(pid: int) -> int:
    """Start of a process in clock ticks since the boot; 0 if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *fields = text.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])


def _alive(found: Owner) -> bool | None:
    """Whether the process of a record lives; None: it is of another machine or container, or nothing tells."""
    if not (found.machine and found.ticks) or found.machine != _machine():
        return None
    return _ticks(found.pid) == found.ticks
