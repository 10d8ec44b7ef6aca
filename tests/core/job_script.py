"""Commands of data-driven cases about one job: a lead with its membership, one shard, its samples and its cuts.

    job mode=ssp slack=1 workers=2 buckets=1 lease=10      a fresh job; every setting of ``Mode`` goes
    now 5                                                  the clock, in seconds
    join a | leave a | renew a | tick                      membership; its rosters go to the shard at once
    hold-rosters, deliver-roster                           ... or wait until they are delivered, the oldest first
    push a step=0 | pull a | disconnect a | holds a        the shard; base is the step, weight 1, unless given
    norm a step=0 round=0 | norms                          norms of the mean: a question, and what is due
    ask a size=8 batch=2 | return a | push a covers=2      samples
    plan-cut 5 | cut-taken | plan | report 0 5 | fail 0 5  cuts
    export, restore                                        the checkpoint of a job, and a new job that begins with it
    status                                                 versions, clocks and members

A refused call prints its error.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import fields
from typing import Any

from tests.core.datadriven import Call
from torch_ps.common.errors import PsError
from torch_ps.ps.core.consistent_cut import CutPlanner
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.effects import Announce, Apply, Discard, Effects, Evict, Release, Wait
from torch_ps.ps.core.mean_norms import NormAnswer, NormQuestion
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.core.sample_assigner import Portion, SampleAssigner, SampleRequest
from torch_ps.ps.core.shard import Shard


class JobScript:
    """One lead and its shard."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sessions: dict[str, int] = {}  # that each worker believes in
        self.epochs: dict[str, int] = {}  # that each worker has seen
        self.rosters: deque[Roster] | None = None  # that wait for the shard; None: they go to it at once
        self._job(Mode(), {}, 1)

    def _job(self, mode: Mode, settings: dict[str, str], buckets: int) -> None:
        self.mode, self.buckets = mode, buckets
        quorum, lease = int(settings.get("workers", 1)), float(settings.get("lease", 10))
        self.lead = Membership(quorum=quorum, lease=lease, limit=int(settings.get("limit", 100)))
        self.assigner = SampleAssigner(mode)
        self.core = Shard(buckets=buckets, mode=mode, data=self.assigner)
        every, shards = int(settings.get("every", 1)), int(settings.get("shards", 1))
        self.planner = CutPlanner[int](every=every, seconds=0, num_shards=shards, now=self.now)

    def __call__(self, call: Call) -> str:
        try:
            said = getattr(self, f"do_{call.command.replace('-', '_')}")(call)
        except PsError as error:
            return f"{type(error).__name__}: {error}"
        return said or "ok"

    # ------------------------------------------------------------ membership

    def do_job(self, call: Call) -> str:
        given = {f.name: f.type for f in fields(Mode) if f.name in call.settings}
        settings: dict[str, Any] = {
            name: call.settings[name] if kind == "str" else int(call.settings[name]) for name, kind in given.items()
        }
        mode = Mode(name=call.settings.get("mode", "sync"), **settings)
        self._job(mode, call.settings, call.number("buckets", 1))
        return str(mode)

    def do_now(self, call: Call) -> str:
        self.now = float(call.words[0])
        return ""

    def do_join(self, call: Call) -> str:
        (name,) = call.words
        rank = call.number("rank") if "rank" in call.settings else None
        replace = call.settings.get("replace", "yes") == "yes"
        member, effects = self.lead.join(name, rank, self.now, self.core.clock, replace=replace)
        self.sessions[name] = self.epochs[name] = member.session
        return self._tell(effects)

    def do_leave(self, call: Call) -> str:
        (name,) = call.words
        return self._tell(self.lead.leave(name, self._session(call), self.now, self.core.clock))

    def do_renew(self, call: Call) -> str:
        self.lead.renew(call.words[0], self._session(call), self.now)
        return ""

    def do_tick(self, call: Call) -> str:
        return self._tell(self.lead.tick(self.now, self.core.clock))

    def do_hold_rosters(self, call: Call) -> str:
        self.rosters = deque()
        return ""

    def do_deliver_roster(self, call: Call) -> str:
        assert self.rosters is not None
        return self._tell(self.core.set_roster(self.rosters.popleft()))

    # ------------------------------------------------------------ the shard

    def do_push(self, call: Call) -> str:
        (name,) = call.words
        step, covers = call.number("step"), call.settings.get("covers")
        push = Push(
            name,
            self._session(call),
            step,
            call.number("bucket"),
            call.number("base", step),
            float(call.settings.get("weight", 1)),
            call.number("epoch", self.epochs.get(name, 0)),
            ((0, int(covers)),) if covers else (),
        )
        return self._tell(self.core.push(push, self.now))

    def do_pull(self, call: Call) -> str:
        if not call.words:
            return self._tell(self.core.pull(None, 0, call.number("bucket"), self.now))
        return self._tell(self.core.pull(call.words[0], self._session(call), call.number("bucket"), self.now))

    def do_norm(self, call: Call) -> str:
        (name,) = call.words
        question = NormQuestion(
            name,
            self._session(call),
            call.number("step"),
            call.number("round", 0),
            float(call.settings.get("power", 2)),
            float(call.settings.get("weight", 1)),
            call.number("epoch", self.epochs.get(name, 0)),
        )
        return "\n".join(map(norm_line, self.core.ask_norm(question, self.now)))

    def do_norms(self, call: Call) -> str:
        return "\n".join(map(norm_line, self.core.norms_due()))

    def do_disconnect(self, call: Call) -> str:
        return self._tell(self.core.disconnected(call.words[0], self._session(call)))

    def do_holds(self, call: Call) -> str:
        holds = self.core.holds(call.words[0], self._session(call))
        return "\n".join(f"{_request(h.step)} of bucket {h.bucket} since {h.since:g} s: {h.reason}" for h in holds)

    def do_status(self, call: Call) -> str:
        view = self.core.status()
        versions = " ".join(map(str, view.versions))
        lines = [f"epoch {view.epoch}, {'open' if view.open else 'before its quorum'}, versions {versions}"]
        for w in view.workers:
            lines.append(f"{w.rank}: {w.worker} session {w.session} clock {w.clock}{' waits' if w.hold else ''}")
        return "\n".join(lines)

    # ------------------------------------------------------------ samples

    def do_ask(self, call: Call) -> str:
        (name,) = call.words
        request = SampleRequest(
            name,
            self._session(call),
            DatasetSpec("", call.number("size", 8), 0, True),
            call.number("batch", 2),
            call.number("epochs", 1),
            call.number("received", 1 << 30),
        )
        answer = self.core.request_samples(request)
        if isinstance(answer, Portion):
            ranges = " ".join(f"{start}-{stop}" for start, stop in answer.ranges)
            return f"Portion of epoch {answer.epoch}: {ranges}"
        return f"{type(answer).__name__}: {answer.reason}"

    def do_return(self, call: Call) -> str:
        spec = DatasetSpec("", call.number("size", 8), 0, True)
        self.core.return_samples(call.words[0], self._session(call), spec, call.number("received", 1 << 30))
        return ""

    def do_samples(self, call: Call) -> str:
        return "\n".join(f"epoch {d['epoch']}, not done: {d['left']}" for d in self.assigner.export()["sets"])

    # ------------------------------------------------------------ cuts and state

    def do_plan_cut(self, call: Call) -> str:
        return self._tell(self.lead.plan_cut(int(call.words[0])))

    def do_cut_taken(self, call: Call) -> str:
        version, sections = self.core.cut.taken
        return f"version {version}, sections {' '.join(sorted(sections)) or 'none'}"

    def do_plan(self, call: Call) -> str:
        version = self.planner.due(self.now, self.core.open_step, self.lead.num_sessions, stale=self.mode.stale)
        return "nothing is due" if version is None else f"cut at version {version}"

    def do_report(self, call: Call) -> str:
        shard, version = map(int, call.words)
        reports = self.planner.reported(shard, version, shard, self.now)
        return "not whole" if reports is None else f"whole: shards {' '.join(map(str, reports))}"

    def do_fail(self, call: Call) -> str:
        shard, version = map(int, call.words)
        return "given up" if self.planner.failed(shard, version, self.now) else "nothing to give up"

    def do_export(self, call: Call) -> str:
        self.kept: dict[str, Any] = {
            "membership": self.lead.export(),
            "data": self.assigner.export(),
            "buckets": self.core.records(),
        }
        return "\n".join(f"{name}: {json.dumps(value)}" for name, value in self.kept.items())

    def do_restore(self, call: Call) -> str:
        self._job(self.mode, call.settings, self.buckets)
        self.lead.restore(self.kept["membership"])
        self.assigner.restore(self.kept["data"])
        self.core.restore(self.kept["buckets"])
        return self._tell(self.core.set_roster(self.lead.roster))

    # ------------------------------------------------------------ inside

    def _session(self, call: Call) -> int:
        return call.number("session", self.sessions.get(call.words[0], 0))

    def _tell(self, effects: Effects) -> str:
        """The effects, and those of the rosters among them."""
        lines = []
        for effect in effects:
            lines.append(self._wait_line(effect) if isinstance(effect, Wait) else line(effect))
            if isinstance(effect, Announce):
                if self.rosters is None:
                    more = self._tell(self.core.set_roster(effect.roster))
                    lines += [more] if more else []
                else:
                    self.rosters.append(effect.roster)
            elif isinstance(effect, Release) and effect.worker is not None:
                self.epochs[effect.worker] = max(self.epochs.get(effect.worker, 0), self.core.roster.epoch)
        return "\n".join(lines)

    def _wait_line(self, wait: Wait) -> str:
        holds = self.core.holds(wait.worker, wait.session)
        hold = next(each for each in holds if (each.bucket, each.step) == (wait.bucket, wait.step))
        names = " ".join(hold.waiting_for)
        return f"Wait {wait.worker} {_request(wait.step)}{f' for {names}' if names else ''}: {hold.reason}"


def norm_line(answer: NormAnswer) -> str:
    """The answer to one question, in one line."""
    step, turn = answer.key
    mean = " ".join(f"{each.worker}*{each.weight:g}" for each in answer.asked)
    without = f", without {' '.join(answer.without)}" if answer.without else ""
    return f"Norm of step {step}, round {turn}, for {answer.worker}: {mean}{without}"


def line(effect: Apply | Release | Discard | Evict | Announce) -> str:
    """One effect, in one line."""
    match effect:
        case Apply():
            who = " ".join(f"{c.worker}*{c.weight:g}" for c in effect.contributions) or "nothing"
            scale = f", lr_scale {effect.lr_scale:g}" if effect.lr_scale != 1 else ""
            record = ", recorded" if effect.record is not None else ""
            return f"Apply bucket {effect.bucket} version {effect.version} of {who}{scale}{record}: {effect.reason}"
        case Release():
            applied = "" if effect.applied else ", not applied"
            stale = f", staleness {effect.staleness}" if effect.staleness else ""
            what = f"version {effect.version}, next step {effect.next_step}{stale}{applied}"
            return f"Release {effect.worker or 'observer'} {_request(effect.step)} with {what}: {effect.reason}"
        case Discard():
            return f"Discard {effect.worker} {_request(effect.step)}: {effect.reason}"
        case Evict():
            return f"Evict {effect.worker} session {effect.session}: {effect.reason}"
        case Announce():
            roster = effect.roster
            members = " ".join(map(_member, roster.members)) or "nobody"
            cut = f", cut {roster.cut}" if roster.cut else ""
            state = "open" if roster.open else "before its quorum"
            return f"Announce epoch {roster.epoch}, {state}{cut}: {members}: {effect.reason}"


def _member(member: Member) -> str:
    return f"{member.name}/{member.session}{f' from step {member.first_step}' if member.first_step else ''}"


def _request(step: int | None) -> str:
    return "pull" if step is None else f"step {step}"
