"""What became of the steps of a worker: what the servers' answers say, bucket by bucket and of one wait in all."""

from dataclasses import dataclass

from torch_ps.common.pb import parameter_server_pb2 as pb


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What the answers since the last ``wait`` said, all buckets together.

    Attributes:
        version: optimizer steps that every bucket has had.
        staleness: of the first bucket; when pushes of several workers cross, others may differ by a few.
        applied: False if a bucket of the push came late and was dropped.
        samples: sum of the weights that the job has absorbed.
        contributors: workers whose gradients made the first bucket's version, in rank order.
    """

    version: int
    staleness: int
    applied: bool
    samples: float
    contributors: tuple[str, ...]


class BucketVersions:
    """Of one life of a worker.

    Args:
        num_buckets: of the job.
        epoch: of the roster that this life began with.

    Attributes:
        versions: of this worker's copy, by bucket.
        epoch: newest that an answer has named.
    """

    def __init__(self, num_buckets: int, epoch: int) -> None:
        self.versions, self._next_steps, self.epoch = [0] * num_buckets, [0] * num_buckets, epoch
        self._samples, self._contributors = 0.0, tuple[str, ...]()
        self._staleness, self._applied = 0, True

    @property
    def version(self) -> int:
        """Optimizer steps that every bucket has had."""
        return min(self.versions, default=0)

    @property
    def next_step(self) -> int:
        """The step that is to be pushed next."""
        return min(self._next_steps, default=0)

    def take(self, header: pb.DownHeader, version: int) -> None:
        """One answer, which has brought ``version`` of its bucket."""
        self.versions[header.bucket] = version
        self._next_steps[header.bucket] = header.next_step
        self.epoch = max(self.epoch, header.epoch)
        self._applied &= header.applied or not header.HasField("step")
        if header.bucket == 0:
            self._staleness, self._samples = header.staleness, header.samples
            self._contributors = tuple(header.contributor)

    def outcome(self) -> StepOutcome:
        """Of the answers since the last call."""
        found = StepOutcome(self.version, self._staleness, self._applied, self._samples, self._contributors)
        self._staleness, self._applied, self._contributors = 0, True, ()
        return found
