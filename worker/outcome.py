"""What became of one step of a worker."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
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
