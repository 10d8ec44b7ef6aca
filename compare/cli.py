"""ps-compare: the same training under several configurations, side by side.

    planned runs --execute()--> journals --measure()--> results --> table, results.json, report.html

Exit code 0: every run finished. 1: at least one did not. 2: an option was refused before training started.
"""

from __future__ import annotations

import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.common.options.fields import arguments_of
from torch_ps.common.options.slow_workers import parse_slow
from torch_ps.compare import defaults, report
from torch_ps.compare import results as format_
from torch_ps.compare import shared_batch_size as batch_size
from torch_ps.compare.events import Journal
from torch_ps.compare.execute import Executed, execute, leave_nothing
from torch_ps.compare.headline import bytes_sentence, headline
from torch_ps.compare.measure import RunInfo, common_target, measure, with_target
from torch_ps.compare.results import Results, RunResult
from torch_ps.compare.run_process import PS_RUN, PlannedRun, command_line
from torch_ps.compare.run_progress import reporter
from torch_ps.compare.runs import Run, gradients_averaged, learning_rate, lr_rule, parse_runs
from torch_ps.compare.seeds import merge_seeds
from torch_ps.compare.terminal_table import table


@click.command(cls=Command)
@options_of(CompareConfig)
def main(compare: CompareConfig) -> None:
    """Train the same model under several configurations and show what each of them costs.

    Prints a table; writes report.html, which opens in any browser, and results.json.
    """
    for number in set(ending_signals()) - {signal.SIGINT}:
        signal.signal(number, _as_interrupt)
    console = Console()
    code = rewrite_report(compare, console) if compare.report else compare_runs(compare, console)
    if code:
        sys.exit(code)


def compare_runs(config: CompareConfig, console: Console, program: Sequence[str] = PS_RUN) -> int:
    """Execute the runs and publish their results. Returns the exit code.

    Raises:
        ConfigError: an option is refused; no run has trained and nothing is left on disk.
    """
    runs = parse_runs(config.runs)
    config = _with_defaults(config, runs)
    folder = _output_folder(config)
    plans = [plan for run in runs for plan in _plans(run, config, folder)]
    if not report.can_write_report():
        console.print(f"[yellow]{escape(report.MISSING)}")
    rule = lr_rule(runs, config.lr, config.workers, scaled=config.scaled)
    names = [plan.name for plan in plans]
    what = f"{len(plans)} runs of {config.task}, {config.workers} workers, {config.samples} samples each"
    _say(console, f"{what}; {rule}")
    if config.batch_size == "auto":
        config = _with_batch_size(config, plans[0], program, console)
    executed = execute(plans, config, reporter(console, names, config.samples), program)
    results = summarise(executed, config, rule)
    publish(results, folder, console)
    return 1 if executed.failures or executed.interrupted else 0


def summarise(executed: Executed, config: CompareConfig, rule: str) -> Results:
    """Compute the results of the finished runs.

    Args:
        executed: journals of the finished runs, and the failures.
        config: options of the comparison, with the defaults of the task filled in.
        rule: learning rates of the runs in words, see ``lr_rule``.
    """
    of_run: dict[str, list[tuple[RunResult, int]]] = {}
    for plan, journals in executed.finished:
        seed = config.seed if plan.seed is None else plan.seed
        of_run.setdefault(plan.run.name, []).append((measure(_info(plan, config), journals), seed))
    measured = [merge_seeds(*zip(*found, strict=True)) for found in of_run.values()]
    target = config.target if config.target is not None else common_target(measured)
    first = executed.finished[0][1][0] if executed.finished else None
    return Results(
        task=config.task,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        settings={
            **_settings_of(config),
            "lr": config.lr,
            "scale_lr": config.scale_lr,
            "lr_rule": rule,
            "command": shlex.join(["ps-compare", *arguments_of(replace(config, out=""))]),
            **_circumstances(first),
        },
        target_loss=target,
        runs=with_target(measured, target),
        failures=executed.failures,
    )


def publish(results: Results, folder: Path, console: Console) -> None:
    """Print the table; write results.json and, if plotly is installed, report.html into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    format_.write(results, folder / "results.json")
    if results.runs:
        console.print()
        console.print(table(results))
        console.print()
        for sentence in (headline(results), bytes_sentence(results)):
            if sentence:
                _say(console, sentence)
    for failure in results.failures:
        console.print(f"\n[red]{escape(failure.name)} did not finish:[/] {escape(failure.reason)}", highlight=False)
        _say(console, f"full log: {failure.log}")
    console.print()
    try:
        report.write(results, folder / "report.html")
    except ConfigError as error:
        console.print(f"[yellow]{escape(str(error))}")
    else:
        _say(console, f"report:  {(folder / 'report.html').absolute()}")
    _say(console, f"results: {(folder / 'results.json').absolute()}")


def rewrite_report(config: CompareConfig, console: Console) -> int:
    """Print the table and write the report of an earlier comparison, beside its results.json or into ``--out``."""
    source = Path(config.report)
    results = format_.read(source)
    publish(results, Path(config.out) if config.out else source.parent, console)
    return 0


def _plans(run: Run, config: CompareConfig, folder: Path) -> list[PlannedRun]:
    """The runs of one configuration, one per seed."""
    rate = learning_rate(run, config.lr, config.workers, scaled=config.scaled)
    seeds = range(config.seed, config.seed + config.seeds) if config.seeds > 1 else (None,)
    plans = [PlannedRun(run, rate, folder, seed) for seed in seeds]
    return [replace(plan, folder=folder.joinpath(*plan.place)) for plan in plans]


def _with_defaults(config: CompareConfig, runs: Sequence[Run]) -> CompareConfig:
    known = defaults.TASKS.get(config.task)
    changes: dict[str, Any] = {}
    if not config.samples:
        changes["samples"] = known.samples if known else defaults.OWN_TASK_SAMPLES
    if known:
        changes |= {name: getattr(known, name) for name in ("batch_size", "lr") if not getattr(config, name)}
    elif not config.lr and config.scaled and _rates_differ(runs, config.workers):
        raise ConfigError(
            f"the learning rate of task {config.task!r} is not known here, so it cannot be scaled for sync; "
            "give lr, or scale-lr off"
        )
    return replace(config, **changes)


def _with_batch_size(
    config: CompareConfig, first: PlannedRun, program: Sequence[str], console: Console
) -> CompareConfig:
    folder = first.folder.parent / "batch-size"
    try:
        found = batch_size.find(replace(first, folder=folder), config, program)
    except ConfigError:
        leave_nothing(folder)
        raise
    _say(console, f"batch size auto: {found.size} for all runs, as {found.name} found: {found.reason}")
    return replace(config, batch_size=found.size)


def _rates_differ(runs: Sequence[Run], workers: int) -> bool:
    return len({gradients_averaged(run, workers) for run in runs if not run.own_rate}) > 1


def _output_folder(config: CompareConfig) -> Path:
    if not config.out:
        stem = Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        return next(p for i in range(1000) if not (p := stem.with_name(stem.name + (f"-{i}" if i else ""))).exists())
    folder = Path(config.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out {config.out!r} exists and is not an empty folder; give another one")
    return folder


def _info(plan: PlannedRun, config: CompareConfig) -> RunInfo:
    run = plan.run
    return RunInfo(
        name=run.name,
        mode=run.mode,
        compress=run.compress,
        compress_pull=run.compress_pull,
        lr=plan.lr,
        command=command_line(plan, config),
    )


def _settings_of(config: CompareConfig) -> dict[str, Any]:
    """The part of ``settings`` in results.json that the user chose."""
    return {
        "task": config.task,
        "data": config.data,
        "workers": config.workers,
        "samples": config.samples,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "seeds": config.seeds,
        "slow": [f"w{rank}:{factor:g}x" for rank, factor in sorted(parse_slow(config.slow).items())],
        "shards": config.shards,
        "device": config.device,
        "threads": config.threads,
        "evaluations": config.evaluations,
    }


def _circumstances(journal: Journal | None) -> dict[str, Any]:
    """Settings that seconds depend on: model, device, machine and versions."""
    settings: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": _version("torch"),
        "torch_ps": _version("torch-ps"),
    }
    if journal:
        settings |= {"parameters": journal.start.parameters, "device": journal.start.device}
    return settings


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source tree"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
