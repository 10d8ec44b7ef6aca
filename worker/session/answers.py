"""What the answers of one session have said: versions, the step to push next, and the outcome of the last step.

answer of a bucket --add()--> version and next step of that bucket, lowest of all buckets
all answers of a step --take_outcome()--> StepOutcome
"""

from collections import Counter
from dataclasses import dataclass

from torch_ps.common.pb import parameter_server_pb2 as pb


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What the answers since the last ``wait`` said, all buckets together.

    Attributes:
        version: optimizer steps that every bucket has had.
        staleness: staleness of the first bucket; where pushes of several workers cross, others may differ by a few.
        applied: False if a bucket of the push came late and was dropped.
        samples: sum of the weights that the job has absorbed.
        contributors: workers whose gradients made the first bucket's version, in rank order.
    """

    version: int
    staleness: int
    applied: bool
    samples: float
    contributors: tuple[str, ...]


class Lowest:
    """The lowest of many numbers, at first 0, that change one at a time.

    Cost of a change: that of the different numbers there are, which are few, not of all. In sync mode there are two.
    """

    def __init__(self, count: int) -> None:
        self._values = [0] * count
        self._times = Counter(self._values)  # how often each number is there
        self.value = 0

    def __getitem__(self, index: int) -> int:
        return self._values[index]

    def __setitem__(self, index: int, value: int) -> None:
        before, self._values[index] = self._values[index], value
        self._times[value] += 1
        self._times[before] -= 1
        gone = not self._times[before]
        if gone:
            del self._times[before]
        if value < self.value:
            self.value = value
        elif gone and before == self.value:
            self.value = min(self._times)


class Progress:
    """What the answers of one session have said.

    Args:
        num_buckets: buckets of the job.
        epoch: epoch of the roster that the session began with.

    Attributes:
        versions: version of this worker's copy, by bucket.
        next_steps: step to push next, by bucket.
        epoch: newest epoch that an answer has named.
    """

    def __init__(self, num_buckets: int, epoch: int) -> None:
        self.versions, self.next_steps, self.epoch = Lowest(num_buckets), Lowest(num_buckets), epoch
        self._samples, self._contributors = 0.0, tuple[str, ...]()
        self._staleness, self._applied = 0, True

    def add(self, header: pb.DownHeader, version: int) -> None:
        """Note one answer, which has brought ``version`` of its bucket."""
        self.versions[header.bucket] = version
        self.next_steps[header.bucket] = header.next_step
        self.epoch = max(self.epoch, header.epoch)
        self._applied &= header.applied or not header.HasField("step")
        if header.bucket == 0:
            self._staleness, self._samples = header.staleness, header.samples
            self._contributors = tuple(header.contributor)

    def take_outcome(self) -> StepOutcome:
        """The outcome of the answers since the last call."""
        outcome = StepOutcome(self.versions.value, self._staleness, self._applied, self._samples, self._contributors)
        self._staleness, self._applied, self._contributors = 0, True, ()
        return outcome
