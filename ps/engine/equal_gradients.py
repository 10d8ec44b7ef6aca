"""Finds workers that send the same gradients step after step, as they do where all draw the same samples.

    gradients of one step of one bucket, in rank order
        --> sample of each payload --> pairs that are equal --> in STEPS steps in a row --> told once

Only modes that apply the pushes of several workers together compare gradients of the same parameters. Where each push
is applied alone, two workers compute from different parameters, and equal samples do not show in the gradients.

Rules of this file
  1. A gradient that says nothing about the samples is not looked at: weight 0, missing, or zero wherever it is sampled.
  2. A pair that differs in any bucket starts again, so a bucket whose gradient does not depend on data tells nothing.
  3. A push costs at most ``BYTES`` read and hashed, and nothing once a pair has been told.

A codec that draws at random (randk) sends other values for each worker, so its gradients are never equal.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch_ps.ps.engine.parameter_store import Gradient

#: Bytes of a payload that are compared, in ``BLOCKS`` equal parts that are spread over it.
BYTES, BLOCKS = 1024, 16
#: Number of steps in a row in which the gradients of two workers have to be equal.
STEPS = 3
#: Bytes of +0.0 and -0.0 in fp32, fp16 and bf16.
_ZEROS = b"\0\x80"

Digest = tuple[str, int, int]


class EqualGradients:
    """Compares the gradients of the workers of one shard.

    Args:
        say: Called once, with a sentence about the first pair that is found.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told = False
        self._equal: dict[tuple[str, str], Counter[int]] = {}  # steps in a row, by pair and bucket

    def compare(self, bucket: int, gradients: Sequence[Gradient]) -> None:
        """Look at the gradients of one step of one bucket.

        Args:
            bucket: Index of the bucket.
            gradients: Contributions of the step in rank order.
        """
        if self._told or len(gradients) < 2:
            return
        found = {each.worker: digest for each in gradients if (digest := digest_of(each)) is not None}
        for one, other in list(self._equal):
            if one in found and other in found and found[one] != found[other]:
                del self._equal[one, other]
        for pair in _pairs(found.items()):
            steps = self._equal.setdefault(pair, Counter())
            steps[bucket] += 1
            if steps[bucket] == STEPS:
                self._tell(*pair)
                return

    def _tell(self, one: str, other: str) -> None:
        self._told = True
        self._equal.clear()
        self._say(
            f"workers {one} and {other} have sent equal gradients in {STEPS} steps in a row: they seem to train on "
            "the same samples, or noise, so one of them adds nothing; divide the data with torch_ps.shard, with a "
            "sampler by rank (DistributedSampler(dataset, optimizer.world, optimizer.rank)), or draw by rank: "
            "torch.manual_seed(seed + optimizer.rank) once the optimizer is made"
        )


def digest_of(gradient: Gradient) -> Digest | None:
    """Digest of a sample of one payload; None: it says nothing about the samples of its worker."""
    payload = gradient.payload
    if gradient.missing or not gradient.weight:
        return None
    if len(payload) > BYTES:
        size, stride = BYTES // BLOCKS, (len(payload) - BYTES // BLOCKS) // (BLOCKS - 1) // 4 * 4
        sample = b"".join([payload[at : at + size] for at in range(0, BLOCKS * stride, stride)])
    else:
        sample = bytes(payload)
    if not sample.strip(_ZEROS):
        return None
    return gradient.codec.name, len(payload), hash(sample)


def _pairs(found: Iterable[tuple[str, Digest]]) -> list[tuple[str, str]]:
    """Each worker that is equal to an earlier one, after the first of these."""
    first: dict[Digest, str] = {}
    pairs = [(first.setdefault(digest, worker), worker) for worker, digest in found]
    return [(one, other) for one, other in pairs if one != other]
