"""State tables: what the things of the core can be, and which calls lead from one state to another, as data.

Rules of this file
  1. A table lists every change of state and no other. ``tests/core/test_state_tables.py`` explores the machines and
     fails when a machine makes a change that is not here, or no machine makes one that is.
  2. ``scripts/state_diagrams.py`` draws docs/state-machines.md from these tables.
  3. A call that changes no state has no row.

Source: https://github.com/python-hyper/h11, whose documentation is drawn from its tables of states.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_ps.ps.core.failover.seat import Role


@dataclass(frozen=True, slots=True)
class StateTable:
    """The states of one thing.

    Attributes:
        title: names the thing.
        where: file of the machine.
        about: a sentence for the documentation.
        states: each state with what it means; the first is where the thing begins.
        rows: (state, call, next state).
    """

    title: str
    where: str
    about: str
    states: dict[str, str]
    rows: frozenset[tuple[str, str, str]]


def _rows(text: str) -> frozenset[tuple[str, str, str]]:
    """Rows written as lines of ``state: call > next state``."""
    rows = set()
    for line in filter(None, map(str.strip, text.splitlines())):
        state, _, rest = line.partition(": ")
        call, _, after = rest.partition(" > ")
        rows.add((state, call, after))
    return frozenset(rows)


_ROLES = {
    Role.STANDBY.value: "takes the records of its primary and serves nobody",
    Role.ALONE.value: "primary without a standby: everything may be acknowledged",
    Role.PAIRED.value: "primary with a standby: what the standby has may be acknowledged",
    Role.ASKING.value: "wants to serve alone and asks whether it may",
    Role.CONFIRMING.value: "has the votes and makes sure that whoever asks later hears of it",
    Role.DEPOSED.value: "another configuration is in force: this server never serves again",
}

MEMBER = StateTable(
    "A worker in the roster of the lead",
    "ps/core/membership.py",
    "One name in one life of the lead.",
    {
        "away": "not in the roster",
        "expected": "in the roster of a restored job, and not heard of since",
        "member": "in the roster; its lease is renewed by every sign of life",
    },
    _rows("""
        away: join > member
        away: restore > expected
        expected: renew > member
        expected: join > member
        expected: leave > away
        expected: tick > away
        expected: join of another with its rank > away
        member: leave > away
        member: tick > away
    """),
)

PUSH = StateTable(
    "One push",
    "ps/core/shard.py",
    "From the call that brings it to its answer, in any mode. A repeat is another ``push`` of the same step.",
    {
        "sent": "the shard does not know it",
        "parked": "it speaks of a roster that has not come from the lead yet",
        "counted": "it waits for the pushes of others; its payload is held",
        "applied": "its gradient is used; its answer is held back, or was lost with its stream",
        "dropped": "its gradient is not used; its answer is held back, or was lost with its stream",
        "answered": "its worker has fresh parameters, and hears whether the gradient is used",
        "evicted": "its session has left the roster; the payload is discarded",
    },
    _rows("""
        sent: push > parked
        sent: push > counted
        sent: push > applied
        sent: push > dropped
        sent: push > answered
        parked: disconnected > sent
        parked: set_roster > counted
        parked: set_roster > applied
        parked: set_roster > dropped
        parked: set_roster > answered
        parked: set_roster > evicted
        counted: push of another > answered
        counted: push of another > applied
        counted: set_roster > answered
        counted: set_roster > applied
        counted: set_roster > evicted
        applied: push > answered
        applied: push of another > answered
        applied: set_roster > answered
        applied: set_roster > evicted
        dropped: push > answered
        dropped: push of another > answered
        dropped: set_roster > answered
        dropped: set_roster > evicted
    """),
)

QUESTION = StateTable(
    "One question for a norm",
    "ps/core/mean_norms.py",
    "What a worker that clips by the norm of a step's mean gradient asks one shard.",
    {
        "unasked": "the shard does not know it",
        "waiting": "it waits for the questions or pushes of others; its gradient is held",
        "answered": "its worker has the norm of the mean",
        "answered alone": "its worker has the norm of its own gradient, as nobody else is in the mean",
    },
    _rows("""
        unasked: ask > waiting
        unasked: ask > answered
        unasked: ask > answered alone
        waiting: disconnected > unasked
        waiting: ask of another > answered
        waiting: push of another > answered alone
        waiting: set_roster > answered alone
        waiting: set_roster > unasked
    """),
)

POSITION = StateTable(
    "One position of an epoch",
    "ps/core/dataset_progress.py",
    "The samples of a dataset, one epoch at a time.",
    {
        "free": "nobody has it",
        "dealt": "it is one worker's and has not been sent",
        "given": "it has been sent to its worker, and no applied push covers it",
        "done": "an applied push covers it",
    },
    _rows("""
        free: ask > dealt
        free: ask > given
        dealt: ask > given
        dealt: give_back > free
        dealt: leave > free
        given: give_back > free
        given: leave > free
        given: push dropped > free
        given: push applied > done
    """),
)

CUT = StateTable(
    "The cut that the lead plans",
    "ps/core/consistent_cut.py",
    "One cut at a time. It ends when all shards have reported, when one has failed, or 900 s after the first report.",
    {
        "none": "no cut is planned",
        "planned": "a version is announced; no shard has reported it",
        "partial": "some shards have written their part",
    },
    _rows("""
        none: due > planned
        none: last > planned
        none: last > partial
        planned: reported > partial
        planned: last > partial
        planned: failed > none
        partial: reported > none
        partial: failed > none
        partial: due > none
        partial: due > planned
        partial: last > planned
    """),
)

PLACE = StateTable(
    "The place of a shard in an incarnation",
    "ps/core/incarnation.py",
    "As the lead sees it. The lead closes its places when the first worker takes part.",
    {
        "free": "no process has entered",
        "taken": "a process has entered; another one may still take its place",
        "empty for good": "closed, and nobody was there: whoever comes is refused",
        "taken for good": "closed: a process that comes anew has lost what was there and is refused",
    },
    _rows("""
        free: enter > taken
        free: close > empty for good
        taken: close > taken for good
    """),
)

ELECTED_SEAT = StateTable(
    "A seat that workers give",
    "ps/core/failover/elected.py",
    "One server of a shard with --standby-of. A server that starts the job begins as alone.",
    _ROLES,
    _rows("""
        alone: met > paired
        paired: lost > asking
        standby: asked > asking
        standby: tick > asking
        asking: receipt > paired
        asking: received > standby
        asking: tick > standby
        asking: voted > confirming
        confirming: tick > asking
        confirming: accepted > alone
        alone: refused > deposed
        asking: refused > deposed
        asking: voted > deposed
        confirming: refused > deposed
        confirming: voted > deposed
        paired: refused > deposed
        paired: voted > deposed
        standby: refused > deposed
        standby: voted > deposed
    """),
)

LEASED_SEAT = StateTable(
    "A seat that is a key in etcd",
    "ps/core/failover/leased.py",
    "One server of a shard with --etcd. A server that starts the job begins as asking.",
    {role: meaning for role, meaning in _ROLES.items() if role != Role.CONFIRMING.value},
    _rows("""
        asking: observed > alone
        asking: decided > alone
        alone: attach > paired
        paired: lost > asking
        paired: observed > alone
        paired: decided > alone
        standby: observed > asking
        asking: observed > standby
        asking: receipt > paired
        alone: observed > deposed
        alone: refused > deposed
        asking: observed > deposed
        asking: refused > deposed
        paired: observed > deposed
        paired: refused > deposed
        standby: observed > deposed
        standby: refused > deposed
    """),
)

TABLES = (MEMBER, PUSH, QUESTION, POSITION, CUT, PLACE, ELECTED_SEAT, LEASED_SEAT)
