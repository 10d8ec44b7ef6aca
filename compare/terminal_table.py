"""The table of results on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torch_ps.compare.results import Range, Results, RunResult

#: Relative distance from the best value within which another counts as equally good.
AS_GOOD = 0.005
#: Longest word of a run's name that is not broken, even if the other columns need the space.
LONGEST_WORD = 20


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: heading, in two lines.
        value: function from a run to the number that is compared; None if the run has none.
        text: function from a run to the cell.
        best: value to emphasise: the lowest ("min"), the highest ("max") or none ("").
        optional: whether to leave the column out if no run has a value.
        spread: function from a run of several seeds to text behind the cell.
    """

    title: str
    value: Callable[[RunResult], float | None]
    text: Callable[[RunResult], str]
    best: str = ""
    optional: bool = False
    spread: Callable[[RunResult], str] = lambda run: ""


COLUMNS = (
    Column(
        "valid.\nloss",
        lambda run: run.validation_loss,
        lambda run: f"{run.validation_loss:.4f}",
        "min",
        spread=lambda run: _half(run, "validation_loss", 1, 4),
    ),
    Column(
        "valid.\nacc. %",
        lambda run: run.validation_accuracy,
        lambda run: f"{100 * (run.validation_accuracy or 0):.1f}",
        "max",
        optional=True,
        spread=lambda run: _half(run, "validation_accuracy", 100, 1),
    ),
    Column("samples\nper s", lambda run: run.samples_per_second, lambda run: _rate(run.samples_per_second), "max"),
    Column(
        "s to\ntarget", lambda run: run.seconds_to_target, lambda run: _seconds(run.seconds_to_target or 0.0), "min"
    ),
    Column(
        "stale\nmean/max",
        lambda run: run.staleness.mean,
        lambda run: f"{run.staleness.mean:.2f}/{run.staleness.max}",
    ),
    Column(
        "pushed\nMB",
        lambda run: run.bytes.pushed_per_worker,
        lambda run: _mb(run.bytes.pushed_per_worker),
        "min",
    ),
    Column(
        "pulled\nMB",
        lambda run: run.bytes.pulled_per_worker,
        lambda run: _mb(run.bytes.pulled_per_worker),
        "min",
    ),
)


def table(results: Results) -> Table:
    """One row per finished run; the best values of a column are bold unless all are equally good.

    Long names are broken between words, so that a line of 80 characters has room for all columns.
    """
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=escape(caption(results)),
        caption_justify="left",
    )
    words = [len(word) for run in results.runs for word in run.name.split(" ")]
    shown.add_column("run", overflow="fold", min_width=min(LONGEST_WORD, max(words, default=0)))
    columns = [c for c in COLUMNS if not c.optional or any(c.value(run) is not None for run in results.runs)]
    for column in columns:
        shown.add_column(column.title, justify="right", no_wrap=True)
    for run in results.runs:
        shown.add_row(Text(run.name), *(_cell(column, run, results) for column in columns))
    return shown


def caption(results: Results) -> str:
    """Settings that all rows share: task, workers, samples, learning rates, slow workers, seeds and target."""
    settings = results.settings
    words = [f"task {results.task}"]
    if settings.get("parameters"):
        words[0] += f" ({settings['parameters']:,} parameters)"
    words.append(f"{settings.get('workers')} workers")
    words.append(f"{settings.get('samples'):,} samples per run" if settings.get("samples") else "")
    words.append(str(settings.get("lr_rule") or ""))
    if settings.get("slow"):
        words.append("slowed: " + ", ".join(settings["slow"]))
    words.append("bytes per worker")
    if settings.get("seeds", 1) > 1:
        words.append(f"means over {settings['seeds']} seeds, +- half of their range")
    if results.target_loss is not None:
        words.append(f"target loss {results.target_loss:g}")
    return "; ".join(word for word in words if word)


def _cell(column: Column, run: RunResult, results: Results) -> Text:
    if column.value(run) is None:
        return Text("-", style="dim")
    text = column.text(run) + (column.spread(run) if run.spread is not None else "")
    return Text(text, style="bold green" if run in best_runs(column, results.runs) else "")


def best_runs(column: Column, runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs whose value is the best or as good as the best; none if all are equally good."""
    values = {run.name: value for run in runs if (value := column.value(run)) is not None}
    if not column.best or not values:
        return []
    best = min(values.values()) if column.best == "min" else max(values.values())
    good = [run for run in runs if run.name in values and abs(values[run.name] - best) <= AS_GOOD * abs(best)]
    return good if len(good) < len(values) else []


def _half(run: RunResult, name: str, scale: float, digits: int) -> str:
    """Half of the range of a figure over its seeds, as text."""
    span: Range | None = getattr(run.spread, name, None)
    return f" +-{scale * (span.high - span.low) / 2:.{digits}f}" if span is not None else ""


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 1e5 else f"{size / 1e6:.2g}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 10_000 else f"{value:,.0f}"
