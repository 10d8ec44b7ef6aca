"""The list of runs: what ``--runs`` means, what each run is called, and which learning rate is fair to it.

    --runs "sync,async:compress=fp16"  --parse_runs()-->  Run("sync"), Run("async", compress=fp16)
                                                          "sync fp32"  "async fp16"

Rules of this file
  1. An option of a run is an option of ``ps-run``, checked by the declaration that ps-run itself uses.
  2. What has to be equal for the comparison to be fair (task, data, samples, seed, workers) is no option of a run.
  3. The rule of the learning rate is decided here and nowhere else.

N asynchronous updates of size lr move the parameters, to first order in lr, as far as one synchronous update of size
N * lr with the mean of the same N gradients. So asynchronous runs get the base rate and synchronous ones N times it.

Source: the reading of a simulation on optdigits; Goyal et al., arXiv:1706.02677 for the linear rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch_ps.common import codecs
from torch_ps.common.config import ServerConfig, WorkerConfig, check_codecs
from torch_ps.common.errors import ConfigError
from torch_ps.common.fields import Field, declared

#: The same for all runs (an option of ps-compare), or the launcher's own business.
_OF_THE_JOB = {"task", "data", "samples", "seed", "slow", "workers", "mode"}
_OF_THE_LAUNCHER = {"listen", "shard", "lead", "metrics", "insecure", "ready_file", "servers", "name", "rank"}
_SHARED = _OF_THE_JOB | _OF_THE_LAUNCHER | {"events", "evaluations", "log_level"}
_WORDS = {"none": "fp32"}
#: Another word for an option, from the documentation of the codecs.
_SYNONYMS = {"codec": "compress"}


def run_options() -> dict[str, Field]:
    """Options that may differ between runs, by flag name without the dashes."""
    both = {**declared(ServerConfig), **declared(WorkerConfig)}
    return {field.flag[2:]: field for name, field in both.items() if name not in _SHARED}


@dataclass(frozen=True, slots=True)
class Run:
    """One configuration. ``options`` holds what was said, by flag name, in the order in which it was said."""

    mode: str
    options: Mapping[str, str]

    @property
    def compress(self) -> str:
        return self.options.get("compress", "none")

    @property
    def compress_pull(self) -> str:
        return self.options.get("compress-pull", "none")

    @property
    def name(self) -> str:
        """Such as "sync fp32", "async fp16", "sync fp16 pull=bf16 shards=2"."""
        words = [self.mode, _WORDS.get(self.compress, self.compress)]
        if self.compress_pull != "none":
            words.append(f"pull={self.compress_pull}")
        words += [f"{flag}={text}" for flag, text in self.options.items() if flag not in ("compress", "compress-pull")]
        return " ".join(words)

    @property
    def slug(self) -> str:
        """The name as the name of a folder."""
        return "".join(c if c.isalnum() or c in "-.=" else "-" for c in self.name)


def parse_runs(text: str) -> list[Run]:
    """Read a comma-separated list of ``mode[:option=value[:option=value...]]``.

    A part without "=" belongs to the value before it, so that a value may hold a colon ("topk:0.01").

    Raises:
        ConfigError: no run, an unknown mode or option, a refused value, or the same run twice.
    """
    runs = [_parse_run(item.strip()) for item in text.split(",") if item.strip()]
    if not runs:
        raise ConfigError("runs names no run; give at least one, such as sync,async")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"runs holds {name!r} twice; give each run an option that the others lack")
    return runs


def learning_rate(run: Run, base: float, workers: int, *, scaled: bool) -> float:
    """The rate that this run trains with; one that was given to the run itself is left alone.

    Args:
        run: the run.
        base: rate of an asynchronous update; 0 leaves the rate to the task.
        workers: gradients whose mean one synchronous update takes.
        scaled: apply the rule at the top of this file.
    """
    if float(run.options.get("lr", 0)) > 0:
        return float(run.options["lr"])
    return base * workers if scaled and run.mode == "sync" else base


def lr_rule(base: float, workers: int, *, scaled: bool) -> str:
    """The rule in words, for caption and report."""
    rate = f"{base:.6g}" if base else "the task's own rate"
    if not scaled:
        return f"all runs at learning rate {rate} (not scaled)"
    if not base:
        return f"all runs at {rate}"
    return f"async at learning rate {rate}, sync at {workers} x {rate} = {base * workers:.6g}"


def _parse_run(item: str) -> Run:
    mode, *parts = item.split(":")
    declared(ServerConfig)["mode"].convert(mode)
    known = run_options()
    options: dict[str, str] = {}
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
    for flag, text in options.items():
        try:
            known[flag].convert(text)
        except ConfigError as error:
            raise ConfigError(f"run {item!r}: {error}") from None
    run = Run(mode, options)
    try:
        codecs.load(options.get("codecs", ""))
        check_codecs(run.compress, run.compress_pull)
    except ConfigError as error:
        raise ConfigError(f"run {item!r}: {error}") from None
    return run


def _check_option(item: str, flag: str, known: Mapping[str, Field]) -> None:
    if flag in known:
        return
    if flag.replace("-", "_") in _SHARED:
        raise ConfigError(f"run {item!r}: {flag} is the same for all runs or set by the launcher, no option of one run")
    near = difflib.get_close_matches(flag, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"run {item!r}: unknown option {flag!r}{hint} (known: {', '.join(sorted(known))})")
