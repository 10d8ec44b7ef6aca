"""One job of real processes, and the faults that break it: each fault begins, and is mended when its time is over.

    worker i --> Proxy (i, server) --> a server, on the same port in every life

Rules of this file
  1. Every fault names what it does and what mends it, in one place: ``begin`` gives the mending.
  2. Mending is what a supervisor would do: workers that are dead are started again under their name, servers all
     together from the newest checkpoint (docs/checkpointing.md) or, with standbys, one by one (docs/failover.md).
  3. Workers live on if the servers are back within a lease. Where this machine was too busy for that, one that has
     given up is started again, and counted. With standbys none may give up.
"""

import contextlib
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from pathlib import Path

import torch

import torch_ps
from tests.chaos import schedule
from tests.chaos.ledger import Ledger, now
from tests.chaos.pairs import Pairs, pairs
from tests.chaos.schedule import NUM_WORKERS, Fault, Setting
from tests.chaos.worker import NUM_ELEMENTS
from tests.support.jobs import SECONDS, until
from tests.support.processes import Child
from tests.support.proxy import Proxy
from tests.support.restart import Shards, shards
from torch_ps.ps.checkpoint.repository import Checkpoints

#: Bytes that a server may write into one file while its disk is full; its part of a checkpoint is larger.
FULL = 100_000
#: Samples before the end with which no fault begins any more where there are standbys.
LAST = 100
#: What leaves traces of a bug in a log.
BAD = re.compile(r"Traceback|Logging error| bug ")

Mend = Callable[[], None]


class Job:
    """Three workers on leased samples. ``folder`` has all files of it."""

    def __init__(self, servers: Shards | Pairs, setting: Setting, folder: Path, size: int, stack: ExitStack) -> None:
        self.servers, self.setting, self._folder, self._size = servers, setting, folder, size
        places = servers.places if isinstance(servers, Pairs) else [[each] for each in servers.addresses]
        #: Of each worker, by shard, to each of its servers.
        self._proxies = [
            [[stack.enter_context(Proxy(each)) for each in some] for some in places] for _ in range(NUM_WORKERS)
        ]
        self._checkpoints = Checkpoints(str(folder / "kept"))
        most = 1 if setting.mode == "async" else NUM_WORKERS * setting.batch_size
        self.acks = [folder / f"w{number}.acks" for number in range(NUM_WORKERS)]
        self.ledger = Ledger(self.acks, size, most)
        self.lives = [0] * NUM_WORKERS
        self.given_up: set[str] = set()  # logs of workers
        self._may_give_up: list[Child] = []
        self._killed = 0.0  # when the first server of this life was
        self.num_interruptions = 0  # after which the first bucket may have a push that the last one has not
        self.workers = [self._start(number) for number in range(NUM_WORKERS)]

    # -------------------------------------------------------------- faults

    def begin(self, fault: Fault) -> Mend:
        """Break something; what is returned mends it."""
        worker, proxies = self.workers[fault.victim], [*chain(*self._proxies[fault.victim])]
        match fault.kind:
            case schedule.KILL_WORKER:
                self.num_interruptions += 1
                worker.end(signal.SIGKILL)
                return lambda: self._again(fault.victim)
            case schedule.STOP_WORKER:
                self.num_interruptions += 1
                worker.send(signal.SIGSTOP)
                return lambda: worker.send(signal.SIGCONT)
            case schedule.KILL_LEAD | schedule.KILL_SHARD:
                self._killed = self._killed or now()
                self.servers.processes[0 if fault.kind == schedule.KILL_LEAD else -1].end(signal.SIGKILL)
                return self._restart
            case schedule.KILL_PRIMARY | schedule.KILL_STANDBY | schedule.STOP_PRIMARY | schedule.STOP_STANDBY:
                return self._break(fault)
            case schedule.CUT:
                for proxy in proxies:
                    proxy.sever()
                return lambda: None
            case schedule.DELAY | schedule.DROP:
                for proxy in proxies:
                    proxy.hold()
                return lambda: self._release(proxies, drop=fault.kind == schedule.DROP)
            case schedule.DISK_FULL:
                return self._fill()
        raise AssertionError(f"no such fault: {fault.kind}")

    def _again(self, number: int) -> None:
        self.lives[number] += 1
        self.workers[number] = self._start(number)

    def _break(self, fault: Fault) -> Mend:
        """Break servers that belong to a pair."""
        assert isinstance(self.servers, Pairs)
        some = self.servers.primaries if fault.kind.endswith("primary") else self.servers.standbys
        victims = [each.process for each in some[fault.victim : fault.victim + 1] or some]
        for victim in victims:
            victim.send(signal.SIGKILL if fault.kind in schedule.FATAL else signal.SIGSTOP)

        def mend() -> None:
            for victim in victims:
                victim.send(signal.SIGCONT)

        return mend

    def settle(self, seconds: float) -> None:
        """When all go on: start what stays away otherwise, and wait until every server has its place again."""
        if isinstance(self.servers, Pairs):
            self.servers.settle(seconds)

    def _restart(self) -> None:
        """All servers, though one has died: shards of different versions are no job."""
        assert isinstance(self.servers, Shards)
        self.servers.kill()
        killed = now()
        versions = self._checkpoints.versions()
        self.ledger.read()
        self.ledger.went_back(killed, versions[0] if versions else 0)
        self.num_interruptions += NUM_WORKERS
        self._check_logs()
        self.servers.start(resume=True)
        if now() - self._killed > schedule.LEASE / 2:
            self._may_give_up = list(self.workers)
        self._killed = 0.0

    def _release(self, proxies: list[Proxy], *, drop: bool) -> None:
        """Let through what was held, or reset the connections so that it never arrives."""
        for proxy in proxies:
            if drop:
                proxy.sever()
            proxy.release()

    def _fill(self) -> Mend:
        """No room for a checkpoint of any server, by the limit that the kernel puts on the length of files."""
        life = [each for each in self.servers.processes if each.wait(0) is None]  # one may have been killed already
        limits = [(process, resource.prlimit(process.pid, resource.RLIMIT_FSIZE)) for process in life]
        for process, (_, hard) in limits:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FULL, hard))

        def mend() -> None:
            if all(process.wait(0) is None for process in life):  # else whoever keeps checkpoints now may be another
                before = self.servers.status().checkpoint
                until(lambda: self.ended or self._failed(before.failures), "a checkpoint finds no room")
            for process, limit in limits:
                if process.wait(0) is None:
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)

        return mend

    def _failed(self, before: int) -> bool:
        self.ledger.read()
        return self.servers.status().checkpoint.failures > before

    # -------------------------------------------------------------- how it is

    @property
    def ended(self) -> bool:
        """Whether a worker has seen the end of the data."""
        return any(worker.wait(0) == 0 for worker in self.workers)

    @property
    def ends(self) -> bool:
        """Whether the data is about to be used up: a standby whose workers have all left is asked by nobody."""
        self.ledger.read()
        return self.ended or (self.setting.standbys and len(self.ledger.required) > self._size - LAST)

    def check_workers(self) -> None:
        """Raises AssertionError if one has ended with an error that it should not have."""
        for number, worker in enumerate(self.workers):
            if code := worker.wait(0):
                said = worker.output[-3000:]
                given_up = worker in self._may_give_up and "Unreachable: " in said
                assert given_up, f"w{number} ended with {code}: {said}"
                self.given_up.add(worker.log.name)
                self._again(number)

    def check(self) -> None:
        """Everything that has to be so at any time when no fault is under way."""
        self.ledger.read()
        with torch_ps.Client(str(self.servers)) as observer:
            self.ledger.check(observer.pull().params["x"])
        self._check_logs()

    def check_end(self) -> None:
        """After the last worker has ended."""
        self.ledger.read()
        with torch_ps.Client(str(self.servers), name="last") as client:
            zeros = {"x": torch.zeros(NUM_ELEMENTS), "late": torch.zeros(1)}
            client.init(zeros, torch_ps.OptimizerSpec("SGD", lr=1.0))
            result = client.push(zeros, weight=0.0)
        unit = 1 if self.setting.mode == "sync" else self.setting.batch_size
        slack = float(unit * self.num_interruptions)
        self.ledger.check_end(result.params["x"], result.params["late"].item(), result.samples, slack)
        self._check_logs()

    def _check_logs(self) -> None:
        texts = [("servers", self.servers.log)]
        texts += [(path.name, path.read_text(encoding="utf-8")) for path in self._folder.glob("w*.log")]
        for name, text in [each for each in texts if each[0] not in self.given_up]:
            assert not BAD.search(text), f"log of {name}:\n{text[-6000:]}"

    def _start(self, number: int) -> Child:
        servers = ",".join("|".join(proxy.address for proxy in some) for some in self._proxies[number])
        setting = self.setting
        options = (self._size, setting.data_sets, setting.batch_size, setting.plane, str(self.acks[number]))
        log = self._folder / f"w{number}.{self.lives[number]}.log"
        return Child("tests.chaos.worker:train", (servers, f"w{number}", *options), log)


@contextlib.contextmanager
def running(setting: Setting, folder: Path, size: int) -> Iterator[Job]:
    """A job whose first checkpoint is good. Ends its servers well, and everything in any case."""
    start: Callable[..., AbstractContextManager[Shards | Pairs]] = pairs if setting.standbys else shards
    with ExitStack() as stack:
        servers = stack.enter_context(
            start(
                setting.num_shards,
                mode=setting.mode,
                workers=NUM_WORKERS,
                lease=schedule.LEASE,
                bucket_size=0.25,
                checkpoint=str(folder / "kept"),
                checkpoint_every=setting.checkpoint_every,
            )
        )
        job = Job(servers, setting, folder, size, stack)
        try:
            until(lambda: servers.status().checkpoint.version > 0, "the first checkpoint is good")
            job.settle(SECONDS)
            yield job
        finally:
            for worker in job.workers:
                worker.kill()


def resident(pid: int) -> float:
    """MiB of a process that are in memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def left_in_shm(before: set[str]) -> list[str]:
    """Entries of /dev/shm that are new and that no living process has open or mapped."""
    new = {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("sem.mp-")}  # not of ours
    if not new:
        return []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used = (process / "maps").read_text(encoding="utf-8", errors="replace")
            used += " ".join(os.readlink(file) for file in (process / "fd").iterdir())
            new = {name for name in new if f"/dev/shm/{name}" not in used}
    return sorted(name for name in new if Path("/dev/shm", name).exists())
