"""Sentences for the result of a comparison: one about time and loss, one or two about bytes.

Rules of this file
  1. Every number in a sentence is in the results, or a ratio of two of them.
  2. A difference within the thresholds below, or within the spread of several seeds, is called "about the same".
  3. No ratio to a number near 0, which says nothing: both numbers are given in its place.
"""

from __future__ import annotations

import math

from torch_ps.compare.results import Results, RunResult

#: Below this ratio two times are "about the same".
SAME_TIME = 1.03
#: Above this ratio two times are given as they are: the smaller one is hardly more than nothing.
MOST_FACTOR = 100.0
#: Below this relative difference two losses are "about the same".
SAME_LOSS = 0.005
#: Below this difference, half a percentage point, two accuracies are "about the same".
SAME_ACCURACY = 0.005
#: Below this ratio two numbers of bytes are "about the same".
SAME_BYTES = 1.05


def headline(results: Results) -> str:
    """Sentence: the run that reached the target first, by what factor, and the cost in loss."""
    target = results.target_loss
    reached = sorted((r for r in results.runs if r.seconds_to_target is not None), key=lambda r: _seconds(r))
    if not results.runs:
        return "No run finished."
    if target is None:
        return "No run learned anything: no validation loss fell below its first value."
    if not reached:
        return f"No run reached the target loss {target:g}."
    first = reached[0]
    sentence = f"{first.name} reached loss {target:g} first, after {_time(_seconds(first))}"
    if len(results.runs) == 1:
        return f"{first.name} reached loss {target:g} after {_time(_seconds(first))}."
    if len(reached) == 1:
        return f"{first.name} is the only run that reached loss {target:g}, after {_time(_seconds(first))}."
    other = _opponent(first, reached)
    if first.curve and first.curve[0].loss is not None and first.curve[0].loss <= target:
        return (
            f"{first.name} had loss {target:g} before it trained, so that target does not tell the runs apart; "
            "give a lower --target."
        )
    factor = _seconds(other) / _seconds(first) if _seconds(first) > 0 else math.inf
    if factor > MOST_FACTOR:
        sentence += f"; {other.name} after {_time(_seconds(other))}"
    elif factor < SAME_TIME:
        sentence += f", about the same as {other.name}"
    else:
        sentence += f": {factor:.1f} times as fast as {other.name}" if factor >= 1.05 else f", just before {other.name}"
    return sentence + _cost(first, results) + "."


def bytes_sentence(results: Results) -> str:
    """Sentences: the bytes that compression saved, and the run with the fewest; "" if no run saved any."""
    return " ".join(filter(None, (_codec_sentence(results), _thrift_sentence(results))))


def _codec_sentence(results: Results) -> str:
    """Sentence about the first pair of runs that differ in their codec only."""
    for small in results.runs:
        if small.compress == "none":
            continue
        for large in results.runs:
            if large.compress != "none" or _without_codec(large) != _without_codec(small):
                continue
            if not small.bytes.pushed_per_worker:
                continue
            factor = large.bytes.pushed_per_worker / small.bytes.pushed_per_worker
            if factor < SAME_BYTES or large.validation_loss is None or small.validation_loss is None:
                continue
            change = small.validation_loss - large.validation_loss
            loss = _difference(change, large.validation_loss, overlap=_overlap(small, large))
            return (
                f"{small.compress} gradients push {_mb(small.bytes.pushed_per_worker)} instead of "
                f"{_mb(large.bytes.pushed_per_worker)} MB per worker in {small.mode} mode "
                f"({factor:.1f} times less), and the loss {loss}."
            )
    return ""


def _thrift_sentence(results: Results) -> str:
    """Sentence about the run with the fewest bytes among those about as good as the best; "" for few kinds of runs."""
    if len({run.compress for run in results.runs}) < 3 and all(run.mode != "local" for run in results.runs):
        return ""
    accurate = all(run.validation_accuracy is not None for run in results.runs)
    known = [(run, loss) for run in results.runs if (loss := run.validation_loss) is not None]
    if accurate:
        scores = [(run, run.validation_accuracy or 0.0) for run in results.runs]
        best, top = max(scores, key=lambda each: each[1])
        good = [run for run, score in scores if top - score <= SAME_ACCURACY]
        words = f"within half a point of the best accuracy ({100 * top:.1f} %, {best.name}"
    elif known:
        best, top = min(known, key=lambda each: each[1])
        good = [run for run, loss in known if loss - top <= SAME_LOSS * abs(top)]
        words = f"within 0.5 % of the lowest loss ({top:.4g}, {best.name}"
    else:
        return ""
    least = min(good, key=_moved)
    if not _moved(least) or (factor := _moved(best) / _moved(least)) < SAME_BYTES:
        return ""
    return (
        f"Of the runs {words}, {_mb(_moved(best))} MB pushed and pulled), {least.name} moved the least: "
        f"{_mb(_moved(least))} MB, {factor:.1f} times less."
    )


def _without_codec(run: RunResult) -> list[str]:
    """The words of a run's name without its codec."""
    words = run.name.split(" ")
    codec = "fp32" if run.compress == "none" else run.compress
    return [word for word in words if word != codec]


def _moved(run: RunResult) -> int:
    return run.bytes.pushed_per_worker + run.bytes.pulled_per_worker


def _opponent(first: RunResult, reached: list[RunResult]) -> RunResult:
    """The run to compare the fastest with: the first of another mode with the same codec, so that one thing differs.

    Without such a run it is the first of another mode, else the next one.
    """
    rivals = [run for run in reached if run.mode != first.mode]
    alike = [run for run in rivals if run.compress == first.compress and run.compress_pull == first.compress_pull]
    return (alike or rivals or reached[1:])[0]


def _cost(first: RunResult, results: Results) -> str:
    known = [(loss, run) for run in results.runs if (loss := run.validation_loss) is not None]
    if first.validation_loss is None or not known:
        return ""
    best, lowest = min(known, key=lambda each: each[0])
    change = first.validation_loss - best
    if change <= 0 and any(_overlap(first, run) for _, run in known if run is not first):
        return ", and its final loss is the lowest, by less than the seeds differ"
    if change <= 0:
        return ", and it ended with the lowest loss"
    if change <= SAME_LOSS * abs(best):
        return ", and its final loss is within 0.5 % of the lowest"
    above = f", at a final loss {change:.2g} ({100 * change / abs(best):.1f} %) above the lowest"
    return above + _chance(overlap=_overlap(first, lowest))


def _difference(change: float, reference: float, *, overlap: bool) -> str:
    if abs(change) <= SAME_LOSS * abs(reference):
        return "stays within 0.5 %"
    much = f"{100 * abs(change) / abs(reference):.1f} % {'higher' if change > 0 else 'lower'}"
    return f"is {much}{_chance(overlap=overlap)}"


def _chance(*, overlap: bool) -> str:
    return ", less than the seeds differ" if overlap else ""


def _overlap(one: RunResult, other: RunResult) -> bool:
    """Whether the ranges of the final losses of two runs with several seeds overlap."""
    mine, its = (run.spread.validation_loss if run.spread else None for run in (one, other))
    return mine is not None and its is not None and mine.low <= its.high and its.low <= mine.high


def _seconds(run: RunResult) -> float:
    return run.seconds_to_target or 0.0


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _mb(count: int) -> str:
    size = count / 1e6
    return f"{size:.0f}" if size >= 10 else f"{size:.2g}"
