"""make loops SECONDS=600 SEED=7: loops put together at random, compared with plain torch after each line.

    seed, number --> model, optimizer, plane, overlap, workers, lines --> source of a function --> both run it
                     the two part: lines are left out while they still do --> printed as a script

Ends with an error when a loop differs, or when more than one in twenty is refused.
"""

import linecache
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import click
import torch
from torch import nn

from tests.loops import lines
from tests.loops.kinds.absent import Experts
from tests.loops.kinds.models import Tied
from tests.loops.kinds.optimizers import OPTIMIZERS, made
from tests.loops.registry import Kind
from tests.loops.run import Loop
from tests.loops.served import PLANES, compare
from tests.support.training import conv, mlp

MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "experts": Experts, "conv": conv, "tied": Tied}
OVERLAPS = ("auto", "on", "forward", "off", "eager")
#: Share of the loops that may be refused.
MOST_REFUSED = 1 / 20
#: Lines of a loop, about.
LENGTH = 25


@dataclass(frozen=True)
class Setting:
    """A loop and how it runs; prints as what is needed to run it again."""

    name: str
    model: str
    optimizer: str
    plane: str
    overlap: str
    num_workers: int
    lines: tuple[str, ...] = field(repr=False)

    @property
    def source(self) -> str:
        """The loop as a function."""
        return "\n".join(["def loop(r):", "    begin(r)", *(f"    {line}" for line in self.lines)]) + "\n"

    @property
    def kind(self) -> Kind:
        """The loop, to be compared."""
        return Kind(self.name, "random", _compiled(self.source), MODELS[self.model], made(self.optimizer))


def draw(seed: int, number: int) -> Setting:
    """A loop, always the same for a seed and a number."""
    chance = random.Random(f"{seed} {number}")
    optimizer = list(OPTIMIZERS)[number % len(OPTIMIZERS)]
    plane, overlap = PLANES[number % len(PLANES)], chance.choice(OVERLAPS)
    drawn = lines.draw(chance, chance.randrange(LENGTH // 2, 2 * LENGTH), keeps_promise="eager" in overlap)
    num_workers = 2 if chance.random() < 0.25 else 1
    return Setting(
        f"{seed}-{number}", chance.choice(list(MODELS)), optimizer, plane, overlap, num_workers, tuple(drawn)
    )


def _compiled(source: str) -> Loop:
    """The function of a source, whose lines are found by its name as those of a file are."""
    name = f"<loop {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = dict(vars(lines))
    exec(compile(source, name, "exec"), names)
    loop: Loop = names["loop"]
    return loop


def run(setting: Setting) -> str:
    """Run a loop; returns "equal", "refused: WORDS" or the place where it differs."""
    try:
        return compare(setting.kind, setting.plane, setting.overlap, setting.num_workers)
    except Exception as error:  # noqa: BLE001 - a loop that ends with any other error differs
        return f"{type(error).__name__}: {error}"


def shrunk(setting: Setting, kept: Callable[[str], bool], seconds: float = 60.0) -> Setting:
    """A shorter loop of which the same comes.

    Args:
        setting: the loop.
        kept: Returns whether the outcome of a loop is still what is looked for.
        seconds: longest search.
    """
    until, size = time.monotonic() + seconds, max(len(setting.lines) // 2, 1)
    while size:
        at = 0
        while at < len(setting.lines):
            if time.monotonic() > until:
                return setting
            shorter = replace(setting, lines=setting.lines[:at] + setting.lines[at + size :])
            if kept(run(shorter)):
                setting = shorter
            else:
                at += size
        size //= 2
    return setting


@dataclass
class Found:
    """Results of all loops of a run."""

    count: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)

    @property
    def num_loops(self) -> int:
        return self.count.total()

    @property
    def sentence(self) -> str:
        """The figures."""
        return (
            f"{self.num_loops} loops: {self.count['equal']} equal, {self.count['different']} different, "
            f"{self.count['refused']} refused"
        )


def search(
    seed: int,
    seconds: float,
    *,
    first: int = 0,
    most: int | None = None,
    is_shrunk: bool = True,
    overlap: str = "",
    say: Callable[[str], None] = click.echo,
) -> Found:
    """Run loops until the time is over, or ``most`` of them.

    Args:
        seed: seed of the loops.
        seconds: time to run.
        first: number of the first loop.
        most: number of loops, at most.
        is_shrunk: whether a loop that differs is shown in short.
        overlap: overlap of all loops, in place of the drawn one.
        say: function that prints.
    """
    found, until, number = Found(), time.monotonic() + seconds, first
    while time.monotonic() < until and (most is None or number < first + most):
        setting = draw(seed, number)
        setting = replace(setting, overlap=overlap) if overlap else setting
        what = run(setting)
        word = "equal" if what == "equal" else "refused" if what.startswith("refused") else "different"
        found.count[word] += 1
        if word == "refused":
            found.words[what] += 1
        elif word == "different":
            # A part of a loop may break the promise that the whole keeps.
            if is_shrunk and "eager" not in setting.overlap:
                setting = shrunk(setting, lambda what: what != "equal" and not what.startswith("refused"))
                what = run(setting)
            found.different.append(f"{setting}: {what}\n{setting.source}")
            say(found.different[-1])
        number += 1
    return found


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=300.0, type=click.FloatRange(min=0, min_open=True), help="Time to run.")
@click.option("--seed", default=0, help="Of the loops.")
@click.option("--loop", "first", default=0, help="Of that seed, to begin with.")
@click.option("--most", type=int, help="Number of loops, at most.")
@click.option("--overlap", default="", help="Overlap of all loops; drawn if not given.")
def main(seconds: float, seed: int, first: int, most: int | None, overlap: str) -> None:
    """Random loops; fails when one differs from plain torch, or too many are refused."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = search(seed, seconds, first=first, most=most, overlap=overlap)
    for words, times in found.words.most_common():
        click.echo(f"{times} times {words}")
    click.echo(found.sentence)
    if found.different:
        raise click.ClickException(f"{len(found.different)} loops differ; again: --seed {seed} --loop NUMBER --most 1")
    if found.count["refused"] > MOST_REFUSED * found.num_loops:
        raise click.ClickException("more than one loop in twenty is refused")


if __name__ == "__main__":
    main()
