"""The runs of a comparison: parser of ``--runs``, names of runs, and the learning rate that is fair to each.

    --runs "sync,async:codec=fp16,local:8"  --parse_runs()-->  Run("sync"), Run("async"), Run("local"), with options
                                                               "sync fp32"  "async fp16"  "local 8 fp32"

Rules of this file
  1. An option of a run is an option of ps-run, and is checked by the declaration that ps-run uses.
  2. Settings that have to be equal for a fair comparison (task, data, samples, seed, workers) are no options of a run.
  3. Only this file knows the rule of the learning rate.

The learning rate of each kind of run, where ``base`` is the rate at which one worker alone trains well:

    async, ssp          base       each gradient is applied by itself, as that of one worker alone
    local H             base       each inner step is; outer-lr scales the mean of the workers' steps
    sync, ssp:slack=0   N * base   the mean of N gradients; N - b with backup-workers=b

N asynchronous updates of size lr move the parameters, to first order in lr, as far as one synchronous update of size
N * lr with the mean of the same N gradients. A local step uses one worker's batch only, so it trains well at the
rate of one worker, however many there are.

Source: a simulation on optdigits; Goyal et al., arXiv:1706.02677 for the linear rule; Douillard et al.,
arXiv:2311.08105 (DiLoCo), for inner steps at the rate of a worker alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import Field, declared, per_process
from torch_ps.common.options.mode_choices import MODES
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.worker_config import WorkerConfig

#: The same for all runs: given to ps-compare, or chosen by it.
_EQUAL_FOR_FAIRNESS = {"task", "data", "samples", "seed", "slow", "workers", "models", "mode"}
_OF_SECURITY = {"tls_ca", "tls_cert", "tls_key", "token_file"}
_OF_OBSERVABILITY = {"metrics", "events", "evaluations", "log_level", "tensorboard", "trace", "trace_steps"}
_CONFIGS: tuple[type[ServerConfig], type[WorkerConfig]] = (ServerConfig, WorkerConfig)
_WORDS = {"none": "fp32"}
#: Another name of an option, used in the documentation of the codecs.
_SYNONYMS = {"codec": "compress"}

#: Name of a run with local steps; for ps-run they are an option of a mode.
LOCAL = "local"
_STEPS = "local-steps"
#: First words of a run in ``--runs``.
WORDS = (*MODES, LOCAL)


def run_options() -> dict[str, Field]:
    """Options that may differ between runs, by their flags without the dashes."""
    both = {name: field for config in _CONFIGS for name, field in declared(config).items()}
    return {field.flag[2:]: field for name, field in both.items() if name not in _shared()}


def _shared() -> set[str]:
    """Names of the options that are the same for all runs or chosen by a launcher."""
    launched = {name for config in _CONFIGS for name in per_process(config)}
    return launched | _EQUAL_FOR_FAIRNESS | _OF_SECURITY | _OF_OBSERVABILITY


@dataclass(frozen=True, slots=True)
class Run:
    """One configuration.

    Attributes:
        mode: one of ``WORDS``.
        options: given options by flag, in the given order; only a local run has "mode" among them.
    """

    mode: str
    options: Mapping[str, str]

    @property
    def job_mode(self) -> str:
        """The mode in which the servers run."""
        return self.options.get("mode", "sync") if self.mode == LOCAL else self.mode

    @property
    def compress(self) -> str:
        return self.options.get("compress", "none")

    @property
    def compress_pull(self) -> str:
        return self.options.get("compress-pull", "none")

    @property
    def own_rate(self) -> float:
        """The learning rate given for this run alone; 0 if none was."""
        return float(self.options.get("lr", 0))

    @property
    def name(self) -> str:
        """Such as "sync fp32", "async fp16", "local 8 fp32", "sync fp16 pull=bf16 shards=2"."""
        words = [self.mode, *([self.options[_STEPS]] if self.mode == LOCAL else [])]
        words.append(_WORDS.get(self.compress, self.compress))
        if self.compress_pull != "none":
            words.append(f"pull={self.compress_pull}")
        said = {"compress", "compress-pull", _STEPS}
        words += [f"{flag}={text}" for flag, text in self.options.items() if flag not in said]
        return " ".join(words)

    @property
    def slug(self) -> str:
        """The name of the run as that of a folder."""
        return "".join(c if c.isalnum() or c in "-.=" else "-" for c in self.name)


def parse_runs(text: str) -> list[Run]:
    """Read a comma-separated list of ``mode[:option=value[:option=value...]]``, or ``local:STEPS[:option=value...]``.

    A part without "=" belongs to the value before it, so that a value may hold a colon ("topk:0.01").

    Raises:
        ConfigError: there is no run, a mode or option is unknown, a value is refused, options do not go together, or a
            run is given twice.
    """
    runs = [_parse_run(item.strip()) for item in text.split(",") if item.strip()]
    if not runs:
        raise ConfigError("runs names no run; give at least one, such as sync,async")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"runs holds {name!r} twice; give each run an option that the others lack")
    return runs


def gradients_averaged(run: Run, workers: int) -> int:
    """Number of workers whose gradients one step averages; the rule at the top of this file multiplies by it."""
    if run.mode == "sync":
        return max(1, workers - int(run.options.get("backup-workers", 0)))
    return workers if run.mode == "ssp" and run.options.get("slack") == "0" else 1


def learning_rate(run: Run, base: float, workers: int, *, scaled: bool) -> float:
    """Learning rate of a run; one that was given for the run alone is not scaled.

    Args:
        run: mode and options.
        base: rate of one worker alone; 0 leaves the rate to the task.
        workers: number of workers of the job.
        scaled: whether to apply the rule at the top of this file.
    """
    return run.own_rate or (base * gradients_averaged(run, workers) if scaled else base)


def lr_rule(runs: Sequence[Run], base: float, workers: int, *, scaled: bool) -> str:
    """Learning rates of the runs in words, for caption and report."""
    own = [run.name for run in runs if run.own_rate]
    ruled = [run for run in runs if not run.own_rate]
    parts: list[str] = []
    if ruled and not (scaled and base):
        which = "the others" if own else "all runs"
        parts.append(f"{which} at learning rate {base:.6g} (not scaled)" if base else f"{which} at the task's own rate")
    elif ruled:
        parts += _scaled_words(ruled, base, workers)
    if len(own) > 3:
        parts.append(f"{len(own)} runs at the learning rate in their name")
    else:
        parts += [f"{name} at its own" for name in own]
    return ", ".join(parts)


def _scaled_words(runs: Sequence[Run], base: float, workers: int) -> list[str]:
    """Such as "async and ssp at learning rate 0.1", "sync at 2 x 0.1 = 0.2"."""
    kinds: dict[int, list[str]] = {}
    for run in runs:
        known = kinds.setdefault(gradients_averaged(run, workers), [])
        if (kind := _kind_of(run)) not in known:
            known.append(kind)
    words: list[str] = []
    for factor in sorted(kinds):
        rate = f"{base:.6g}" if factor == 1 else f"{factor} x {base:.6g} = {base * factor:.6g}"
        words.append(f"{_listed(kinds[factor])} at {'' if words else 'learning rate '}{rate}")
    return words


def _kind_of(run: Run) -> str:
    """The part of a run's options that decides its learning rate, in words."""
    if run.mode == LOCAL:
        return "each worker's local steps"
    if run.mode == "ssp" and run.options.get("slack") == "0":
        return "ssp slack=0"
    backup = run.options.get("backup-workers", "0") if run.mode == "sync" else "0"
    return f"sync backup-workers={backup}" if backup != "0" else run.mode


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _parse_run(item: str) -> Run:
    mode, *parts = item.split(":")
    if mode not in WORDS:
        raise ConfigError(f"mode must be one of {', '.join(WORDS)}; got {mode!r}")
    options: dict[str, str] = {}
    if mode == LOCAL:
        options[_STEPS] = parts.pop(0) if parts else ""
        if not (options[_STEPS].isdecimal() and int(options[_STEPS]) >= 2):
            raise ConfigError(f"run {item!r}: local needs the steps between two pushes, 2 or more, as in local:8")
    known = run_options() | ({"mode": declared(ServerConfig)["mode"]} if mode == LOCAL else {})
    last = ""
    for part in parts:
        flag, equals, value = part.partition("=")
        if equals:
            last = flag.strip().removeprefix("--").replace("_", "-")
            last = _SYNONYMS.get(last, last)
            _check_option(item, last, known)
            if last in options:
                raise ConfigError(f"run {item!r} gives {last} twice")
            options[last] = value.strip()
        elif last:
            options[last] += ":" + part
        else:
            raise ConfigError(f"run {item!r} holds {part!r}; an option is written name=value")
    if mode != LOCAL and options.get(_STEPS, "1") != "1":
        raise ConfigError(f"run {item!r}: local steps are written local:{options[_STEPS]}, then :mode={mode}")
    run = Run(mode, options)
    try:
        _check_together(run, known)
    except ConfigError as error:
        raise ConfigError(f"run {item!r}: {error}") from None
    return run


def _check_together(run: Run, known: Mapping[str, Field]) -> None:
    """Build the configs that ps-run would build, so that a bad run is refused before others have trained for an hour.

    Raises:
        ConfigError: a value is refused, or options do not go together.
    """
    values: dict[str, Any] = {known[flag].name: known[flag].convert(text) for flag, text in run.options.items()}
    values["mode"] = run.job_mode
    for config in _CONFIGS:
        config(**{name: value for name, value in values.items() if name in declared(config)})


def _check_option(item: str, flag: str, known: Mapping[str, Field]) -> None:
    if flag in known:
        return
    if flag.replace("-", "_") in _shared():
        raise ConfigError(
            f"run {item!r}: {flag} is the same for all runs or set by the launcher, not an option of one run"
        )
    near = difflib.get_close_matches(flag, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"run {item!r}: unknown option {flag!r}{hint} (known: {', '.join(sorted(known))})")
