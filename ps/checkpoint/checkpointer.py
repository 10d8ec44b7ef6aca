"""Writes a shard's checkpoints while it trains: decides when, writes on its own thread, reports to the lead.

    CutPlanner (lead) --cut V--> each shard: Cutter --ShardState--> thread: write --Kept--> lead: commit, plan next

Rules of this file
  1. Training never waits for a file: threads write, one at a time, and the event loop only hears of the result. Nor
     does the end of the process: a disk that does not answer keeps its thread.
  2. Whatever the file system does, training goes on. A failure is logged with what to do, counted and shown; the next
     checkpoint is tried as planned. What some shards have written of a failed one is removed, as it takes room.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, Unpack

from torch_ps.common.daemon_thread import to_daemon_thread
from torch_ps.common.errors import ProtocolError
from torch_ps.ps.checkpoint.manifest import Manifest, shard_name
from torch_ps.ps.checkpoint.ownership import Ownership
from torch_ps.ps.checkpoint.repository import Checkpoints
from torch_ps.ps.checkpoint.storage import FileFact
from torch_ps.ps.core.consistent_cut import CutPlanner
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.shard_state import CheckpointFacts, Cutter, Kept, ReportKept, ShardState
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.listeners import JobListener
from torch_ps.ps.observability.bug_reports import report_bug

log = logging.getLogger("torch_ps.ps")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

#: Seconds without progress after which a stopping shard gives up its last checkpoint, between two looks at the
#: progress, and between two lines about it.
FINISH_SECONDS, LOOK_SECONDS, SAY_SECONDS = 60.0, 1.0, 20.0
#: Seconds that a report to the lead may take; the same when stopping, where the lead waits as long for one.
REPORT_SECONDS, LAST_REPORT_SECONDS = 300.0, 5.0
#: Report of a shard that was not at rest when the job was stopped; no failure.
UNDER_WAY = "a step was under way"
#: Characters of an error that are passed on.
MAX_ERROR = 500


class Checkpointer(JobListener):
    """The checkpoints of one shard. All methods but ``_on_state`` run on the event loop.

    Args:
        checkpoints: Repository that they are written to.
        ownership: Keeps other jobs out of that place.
        every: Versions between two checkpoints; 0 if ``seconds`` decides.
        seconds: Seconds between two checkpoints; 0 if ``every`` decides.
        keep: Number of checkpoints that stay.
        report: Reports this shard's part to the lead; None on the lead.

    Attributes:
        checkpoints: The repository.
        ownership: Whose the place is.
        facts: How the checkpoints of this shard do.
    """

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        ownership: Ownership,
        *,
        every: int,
        seconds: float,
        keep: int,
        report: ReportKept | None,
    ) -> None:
        self._job, self.checkpoints, self._keep, self._report_kept = job, checkpoints, keep, report
        self.ownership = ownership
        self._loop = asyncio.get_running_loop()
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cutter: Cutter | None = None
        self._planner: CutPlanner[FileFact] | None = None
        if job.membership is not None:
            now = time.monotonic()
            self._planner = CutPlanner(every=every, seconds=seconds, num_shards=job.settings.num_shards, now=now)
        self._part: Kept | None = None  # this shard's last
        self._taken: Kept | None = None  # the last part whose report the lead has taken
        self._settled = asyncio.Event()  # the last checkpoint is good, or never will be
        self.facts = CheckpointFacts(checkpoints.storage.url, job.resumed_version)

    # -------------------------------------------------------------- when

    def on_engine_built(self, engine: Engine) -> None:
        self._cutter = Cutter(engine, self._job.streams, self._job.metrics, self._on_state, self._on_failed)
        engine.work.take = self._cutter.take

    def on_parameters_ready(self) -> None:
        self.plan()

    def plan(self) -> None:
        """Lead: announce the next cut when it is time for one."""
        job = self._job
        if self._planner is None or job.engine is None or not job.seeding.initialised:
            return
        version = self._planner.due(
            time.monotonic(), job.engine.core.open_step, job.lead.num_sessions, stale=job.settings.mode.stale
        )
        if version is not None:
            job.plan_cut(version)

    # -------------------------------------------------------------- writing

    def on_cut_missed(self, version: int) -> None:
        """Report the part as failed: without that the lead waits for it and plans no other version."""
        if self._report_kept is not None:
            error = "the server that was to write it is gone; its standby goes on"
            self._spawn(self._report_missed(self._report_kept, Kept(self._job.settings.index, version, 0, "", error)))

    async def _report_missed(self, report: ReportKept, kept: Kept) -> None:
        await report(kept, LAST_REPORT_SECONDS, True)  # a lead that is gone too plans again by itself

    def _on_state(self, state: ShardState) -> None:
        """On the executor: all buckets have been copied."""
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._write(state)))

    def _on_failed(self, version: int, error: Exception) -> None:
        """On the executor: a bucket could not be copied, so this version is given up."""
        told = report_bug(f"the copy of version {version} for a checkpoint", error)
        kept = Kept(self._job.settings.index, version, 0, "", str(told))
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._report(kept, REPORT_SECONDS)))

    async def _write(self, state: ShardState, seconds: float = REPORT_SECONDS) -> None:
        job, begin = self._job, time.monotonic()
        fact, error = FileFact("", 0, ""), ""
        try:
            fact = await self._on_thread(self._write_part, state)
        except Exception as failure:  # noqa: BLE001 - whatever a file system raises, training goes on
            error = _said(failure)
        else:
            job.metrics.checkpoint_seconds.observe(time.monotonic() - begin)
        self._part = Kept(job.settings.index, state.version, fact.size, fact.sha256, error)
        await self._report(self._part, seconds)

    async def _report(self, kept: Kept, seconds: float) -> None:
        if self._report_kept is None:
            self.take_report(kept)
        else:
            if kept is not self._taken:
                self._note(kept.version, kept.error)
            if await self._report_kept(kept, seconds, kept is not self._taken):
                self._taken = kept
            elif kept is not self._taken:  # else the lead has ended, and wanted nothing more
                log.warning("the lead has not taken the report about this shard's part of version %d", kept.version)

    def take_report(self, kept: Kept) -> None:
        """Lead: a shard has written its part, or could not.

        Raises:
            ProtocolError: There is no such shard, or this one is not the lead.
        """
        planner, now, job = self._planner, time.monotonic(), self._job
        if planner is None:
            raise ProtocolError(f"shard {job.settings.index} collects no checkpoints; the lead does")
        if kept.error:
            if planner.failed(kept.shard, kept.version, now):
                self._note(kept.version, f"shard {kept.shard}: {kept.error[:MAX_ERROR]}")
                self._settled.set()
                self.plan()
        else:
            name = shard_name(kept.version, kept.shard, job.settings.num_shards, "json")
            facts = planner.reported(kept.shard, kept.version, FileFact(name, kept.size, kept.sha256), now)
            if facts is not None and job.model is not None and job.engine is not None:
                version, sections = job.engine.core.cut.taken
                manifest = Manifest(
                    version=version,
                    mode=str(job.settings.mode),
                    bucket_bytes=job.settings.bucket_bytes,
                    model=job.model,
                    shards=facts,
                    sections=sections,
                    created=time.time(),
                )
                self._spawn(self._commit(manifest))
                return
        if planner.gave_up(kept.version):  # another shard has failed, maybe before this one had written its part
            self._spawn(self._discard(kept.version))

    async def _commit(self, manifest: Manifest) -> None:
        try:
            await self._on_thread(self._make_good, manifest)
        except Exception as failure:  # noqa: BLE001 - as in _write
            self._note(manifest.version, _said(failure))
            await self._discard(manifest.version)
        else:
            self._note(manifest.version, "")
            log.info("checkpoint of version %d is good: %s", manifest.version, self.facts.url)
        self._settled.set()
        self.plan()

    async def _discard(self, version: int) -> None:
        """Remove the files of a checkpoint that will never be complete."""
        try:
            await self._on_thread(self.checkpoints.discard, version)
        except Exception as failure:  # noqa: BLE001 - as in _write; the next good one removes it
            log.info("what is left of version %d stays for now: %s", version, _said(failure))

    async def _on_thread(self, function: Callable[[Unpack[Arguments]], Result], *arguments: *Arguments) -> Result:
        async with self._writing:
            return await to_daemon_thread(function, *arguments, name="checkpoint")

    def _write_part(self, state: ShardState) -> FileFact:
        """On a thread."""
        self.ownership.check()
        return self.checkpoints.write(state, self._job.settings.index, self._job.settings.num_shards)

    def _make_good(self, manifest: Manifest) -> None:
        """On a thread."""
        self.ownership.check()
        self.checkpoints.commit(manifest)
        self.checkpoints.retain(self._keep)

    def _note(self, version: int, error: str) -> None:
        if error.endswith(UNDER_WAY):  # nothing has failed
            log.info("version %d is not kept: %s", version, error)
            return
        facts, metrics = self.facts, self._job.metrics
        facts.error = error
        if not error:
            facts.version, facts.written = version, time.monotonic()
            metrics.checkpoint_version.set(version)
            return
        facts.failures += 1
        metrics.checkpoint_failures.inc()
        log.error(
            "no checkpoint of version %d: %s; training goes on and the next one is tried as planned, so make room or "
            "see to %s%s",
            version,
            error,
            facts.url,
            f" ({last})" if (last := self._last_good) else "",
        )

    # -------------------------------------------------------------- the end

    async def finish(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Write a last checkpoint, if the job is at rest; give up where nothing is written for ``FINISH_SECONDS``.

        Args:
            on_progress: Called every ``LOOK_SECONDS`` in which something was written.
        """
        storage, finishing = self.checkpoints.storage, asyncio.create_task(self._finish())
        written, moved = storage.written, time.monotonic()
        said, first = moved, written
        while not finishing.done():
            await asyncio.wait({finishing}, timeout=min(LOOK_SECONDS, FINISH_SECONDS))
            now = time.monotonic()
            if storage.written != written:
                written, moved = storage.written, now
                on_progress()
                if now - said > SAY_SECONDS and not finishing.done():
                    said = now
                    log.info("still writing the last checkpoint: %.0f MiB so far", (written - first) / 2**20)
            elif now - moved > FINISH_SECONDS and not finishing.done():
                finishing.cancel()
                await asyncio.wait({finishing})
                version = self._job.engine.core.open_step if self._job.engine is not None else 0
                self._note(version, f"the job has ended, and nothing was written for {FINISH_SECONDS:g} s")
                return
        finishing.result()

    async def _finish(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._keep_last()

    @property
    def unkept(self) -> str:
        """Sentence for a job that ends although its last checkpoint has failed; "" if it has not."""
        facts = self.facts
        if not facts.error:
            return ""
        last = f", {last}" if (last := self._last_good) else ""
        return f"the last checkpoint in {facts.url} has failed{last}: {facts.error}"

    @property
    def _last_good(self) -> str:
        """Clause about the checkpoint to go on from; "" on another shard than the lead, which alone knows."""
        if self._planner is None:
            return ""
        version = self.facts.version
        return f"the last good one is of version {version}" if version else "no good one is known"

    async def _keep_last(self) -> None:
        engine, begin = self._job.engine, time.monotonic()
        if engine is None or self._cutter is None or engine.core.open_step in (0, self._job.resumed_version):
            return
        version = engine.core.open_step
        if self._planner is not None and version == self.facts.version:
            return
        if (
            self._part is not None
            and self._part.version == version
            and not self._part.error
            and self._report_kept is not None
        ):
            await self._report(self._part, LAST_REPORT_SECONDS)
            return
        index, planner = self._job.settings.index, self._planner
        if planner is not None and planner.awaits_others(index, version):  # else what it has reported would be replaced
            self._settled.clear()
            await self._until_settled(version, LAST_REPORT_SECONDS)
            return
        state = self._cutter.at_rest()
        if state is None:
            log.info("version %d is not kept: its step was under way when the shard stopped", version)
            if self._report_kept is not None:
                await self._report(Kept(index, version, 0, "", UNDER_WAY), LAST_REPORT_SECONDS)
            return
        if planner is not None:
            planner.last(index, version)
            engine.core.cut.rest(version)
            self._settled.clear()
        await self._write(state, LAST_REPORT_SECONDS)
        if planner is not None:
            await self._until_settled(version, LAST_REPORT_SECONDS + 2 * (time.monotonic() - begin))

    async def _until_settled(self, version: int, seconds: float) -> None:
        """Lead: wait until the last checkpoint is good, or never will be."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), seconds)
            return
        log.warning("version %d is not kept: not all shards have written their part", version)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _said(failure: BaseException) -> str:
    """One line about an error of a file system."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:MAX_ERROR]
