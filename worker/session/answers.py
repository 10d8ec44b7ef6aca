"""What the answers of one session have said: versions, the step to push next, and the outcome of the last step.

answer of a bucket --add()--> version and next step of that bucket, lowest of all buckets
all answers of a step --take_outcome()--> StepOutcome
"""

from dataclasses import dataclass

from torch_ps.common.lowest import Lowest
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
        zeros = [0] * num_buckets
        self.versions, self.next_steps, self.epoch = Lowest(zeros), Lowest(zeros), epoch
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
