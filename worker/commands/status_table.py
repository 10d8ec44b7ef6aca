"""Renders a ``JobView`` for a terminal: a headline, warnings, the checkpoint, a table of workers and one of shards."""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torch_ps.worker.commands.job_view import JobView, MissingView, ShardView, WorkerView
from torch_ps.worker.transport.wait_reasons import format_seconds

#: Left-aligned columns; those of them whose text may wrap; the width in characters that a wrapped column needs.
_WORDS, _WRAPPED, _ROOM = ("worker", "plane", "waits", "address", "standby"), ("waits", "standby"), 24
#: Columns that are dropped on a narrow terminal, in this order.
_DISPENSABLE = (
    *("plane", "memory", "buckets", "versions/s", "steps/s", "not finite", "max", "late", "parameters", "silent"),
    *("rank", "staleness mean", "pulled", "pull", "out", "CPU", "staleness", "clock"),
)

Columns = dict[str, Callable[[Any], str]]


def render(job: JobView, width: int, *, live: bool = False) -> RenderableType:
    """Build everything that ps-status prints for one poll.

    Args:
        job: numbers to show.
        width: characters per line; columns that do not fit are dropped.
        live: show rates and leave out columns that never change.
    """
    parts: list[RenderableType] = [Text(_headline(job))]
    parts += [Text.from_markup(f"[bold]missing[/bold]: {escape(_missing(each))}") for each in job.missing]
    parts += [Text.from_markup(f"[bold]warning[/bold]: {escape(advice)}") for advice in job.advice]
    if job.checkpoint:
        parts.append(Text(job.checkpoint))
    workers, shards = (_LIVE_WORKERS, _LIVE_SHARDS) if live else (_WORKERS, _SHARDS)
    if not any(shard.standby for shard in job.shards):
        shards = {title: text for title, text in shards.items() if title != "standby"}
    title = f"workers, without {job.more_workers} more" if job.more_workers else "workers"
    return Group(*parts, _table(title, workers, job.workers, width), _table("shards", shards, job.shards, width))


def _missing(shard: MissingView) -> str:
    return f"shard {shard.shard} at {' or '.join(shard.addresses)}: {shard.reason}"


def _headline(job: JobView) -> str:
    words = [
        *([f"job {job.job}"] if job.job else []),
        f"mode {job.mode}",
        "initialised" if job.initialised else "no parameters yet",
        f"up {format_seconds(job.uptime_seconds)}",
        f"roster epoch {job.epoch}",
    ]
    if job.samples:
        words.append(f"{job.samples:,.0f} samples")
    if job.samples_per_second is not None:
        words.append(f"{_number(job.samples_per_second)} samples/s")
    return ", ".join(words) + ("" if job.open else "; the first workers have not all joined")


def _table(title: str, columns: Columns, rows: Sequence[WorkerView] | Sequence[ShardView], width: int) -> Table:
    cells = {name: [text(row) for row in rows] for name, text in columns.items()}

    def needed() -> int:
        longest = {name: max(map(len, [name, *texts])) for name, texts in cells.items()}
        return sum(2 + (min(size, _ROOM) if name in _WRAPPED else size) for name, size in longest.items())

    for name in _DISPENSABLE:
        if needed() > width:
            cells.pop(name, None)
    style = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_justify="left", title_style="bold", **style)  # type: ignore[arg-type]
    for name in cells:
        table.add_column(name, justify="left" if name in _WORDS else "right", no_wrap=name not in _WRAPPED)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(escape, row))
    return table


def _number(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits if value < 100 else 0}f}"


def _bytes(count: float | None, per: str = "") -> str:
    """Format a size in the unit that leaves at most three digits before the decimal point."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.95 or unit == "TB":
            break
        count /= 1000
    return f"{count:.{0 if unit == 'B' else 1}f} {unit}{per}"


def _name(worker: WorkerView) -> str:
    return worker.name if worker.connected else f"{worker.name} (not connected)"


_WORKERS: Columns = {
    "rank": lambda w: str(w.rank),
    "worker": _name,
    "clock": lambda w: str(w.clock),
    "staleness": lambda w: "-" if w.staleness is None else str(w.staleness),
    "pushed": lambda w: _bytes(w.pushed_bytes),
    "pulled": lambda w: _bytes(w.pulled_bytes),
    "plane": lambda w: w.plane,
    "silent": lambda w: format_seconds(w.silent_seconds),
    "waits": lambda w: w.waits,
}
_LIVE_WORKERS: Columns = {
    "rank": _WORKERS["rank"],
    "worker": _name,
    "clock": _WORKERS["clock"],
    "steps/s": lambda w: _number(w.steps_per_second, 1),
    "samples/s": lambda w: _number(w.samples_per_second),
    "staleness": _WORKERS["staleness"],
    "push": lambda w: _bytes(w.pushed_bytes_per_second, "/s"),
    "pull": lambda w: _bytes(w.pulled_bytes_per_second, "/s"),
    "plane": _WORKERS["plane"],
    "silent": _WORKERS["silent"],
    "waits": _WORKERS["waits"],
}
_SHARDS: Columns = {
    "shard": lambda s: f"{s.shard}/{s.shards}",
    "address": lambda s: s.address,
    "standby": lambda s: s.standby or "-",
    "parameters": lambda s: f"{s.parameters:,}",
    "buckets": lambda s: str(s.buckets),
    "version": lambda s: str(s.version),
    "staleness mean": lambda s: f"{s.staleness_mean:.2f}",
    "max": lambda s: str(s.staleness_max),
    "late": lambda s: str(s.late),
    "not finite": lambda s: str(s.not_finite),
    "memory": lambda s: _bytes(s.memory_bytes),
}
_LIVE_SHARDS: Columns = {
    "shard": _SHARDS["shard"],
    "address": _SHARDS["address"],
    "standby": _SHARDS["standby"],
    "version": _SHARDS["version"],
    "versions/s": lambda s: _number(s.versions_per_second, 1),
    "staleness mean": _SHARDS["staleness mean"],
    "queue": lambda s: str(s.queued),
    "busy": lambda s: "-" if s.busy is None else f"{s.busy:.0%}",
    "CPU": lambda s: "-" if s.cores is None else f"{s.cores:.0%}",
    "memory": _SHARDS["memory"],
    "in": lambda s: _bytes(s.pushed_bytes_per_second, "/s"),
    "out": lambda s: _bytes(s.pulled_bytes_per_second, "/s"),
    "not finite": _SHARDS["not finite"],
}
