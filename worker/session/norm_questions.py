"""Asks the servers for the norm of a step's mean gradient, before the step is pushed.

    Measure of every bucket --> each shard --> Measured: norms of the mean by bucket, and whose gradients are in it
    begin() ... take() ... finish(): the norm over all buckets of all shards

Rules of this file
  1. A question names its step and round; a round that was not answered is asked again under the same number.
  2. Every worker computes the norm from the same numbers in the same way, so all get the same bits.
  3. Where only this worker is in the mean, nothing is measured: the worker knows its own gradient.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch_ps.common.pb import parameter_server_pb2 as pb


@dataclass(frozen=True, slots=True)
class MeanNorm:
    """The norm of a step's mean gradient.

    Attributes:
        norm: the norm, not finite where a gradient is not; None where only this worker is in the mean.
        contributors: workers whose gradients are in the mean, in rank order.
        without: workers whose gradients the step has and the mean has not, as they have pushed without asking.
    """

    norm: float | None
    contributors: tuple[str, ...]
    without: tuple[str, ...]


class NormQuestions:
    """The questions of one session, one at a time."""

    def __init__(self) -> None:
        self._key = -1, 0
        self._answers: dict[int, pb.Measured] = {}

    def begin(self, step: int) -> int:
        """Begin a question for the norm of ``step``; returns its round."""
        if step != self._key[0]:
            self._key = step, 0
        self._answers.clear()
        return self._key[1]

    def take(self, shard: int, measured: pb.Measured) -> bool:
        """Take the answer of a shard; returns whether it answers the present question."""
        if (measured.step, measured.round) != self._key:
            return False
        self._answers[shard] = measured
        return True

    def finish(self, power: float) -> MeanNorm:
        """The answer of all shards, once all have come; the next question of this step is of the next round."""
        self._key = self._key[0], self._key[1] + 1
        answers = [self._answers[shard] for shard in sorted(self._answers)]
        contributors = min((tuple(answer.contributor) for answer in answers), key=len)
        without = tuple(dict.fromkeys(name for answer in answers for name in answer.without))
        alone = any(not answer.norm for answer in answers)
        norm = None if alone else combine((norm for answer in answers for norm in answer.norm), power)
        return MeanNorm(norm, contributors, without)


def combine(norms: Iterable[float], power: float) -> float:
    """The norm of a vector, given those of its parts.

    Args:
        norms: norms of the parts, in any order.
        power: type of the norm, > 0; inf for the largest absolute value.
    """
    norms = list(norms)
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    largest = max(norms, default=0.0)
    if power == math.inf or largest in (0.0, math.inf):
        return largest
    total: float = math.fsum((norm / largest) ** power for norm in norms) ** (1 / power)  # no power overflows
    return largest * total
