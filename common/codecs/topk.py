"""topk: the values of largest magnitude and their indices; of d values k = density * d, d / (2k) times smaller.

    payload: [ index of each, int32, increasing | value of each, fp32 ]        all other values are 0

Partitioning a million values to find the k largest takes ten times as long as reading them. So a sample gives a
threshold that few values besides the k largest reach; only these candidates are partitioned.

Source: Stich et al., NeurIPS 2018, arXiv:1809.07599, with error feedback; the sampled threshold is that of Lin et al.,
ICLR 2018, arXiv:1712.01887.
"""

import numpy as np
import torch

from torch_ps.common.codecs.plain import check_size
from torch_ps.common.codecs.registry import count, density_of
from torch_ps.common.errors import CorruptFrame
from torch_ps.common.wire.frames import Buffer

#: One value in this many is in the sample; a prime, so that it has no period in common with the data.
_STRIDE = 61
#: Number of candidates that the threshold aims at: k times the margin, plus standard deviations of the sample's count.
_MARGIN, _DEVIATIONS = 1.1, 4.0


def largest(
    magnitude: "np.ndarray[tuple[int], np.dtype[np.float32]]", k: int
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Indices of the ``k`` largest of ``magnitude``, shape (n,), in increasing order; ties are broken arbitrarily.

    Cost: O(n): two passes over the values, and a partition of all of them if the sample misleads.
    """
    n = len(magnitude)
    candidates = None
    sample = magnitude[::_STRIDE].copy()
    expected = k / _STRIDE
    wanted = int(_MARGIN * expected + _DEVIATIONS * expected**0.5) + 1
    if wanted < len(sample) // 2:
        sample.partition(len(sample) - wanted)
        candidates = np.flatnonzero(magnitude >= sample[len(sample) - wanted])
    if candidates is None or len(candidates) < k:
        candidates = np.arange(n)
    if len(candidates) == k:
        return candidates
    place = np.argpartition(magnitude[candidates], len(candidates) - k)[len(candidates) - k :]
    place.sort()
    return candidates[place]


def check_finite(name: str, values: memoryview) -> None:
    """Refuse values that are infinite or NaN.

    Raises:
        CorruptFrame: a value is.
    """
    if not np.isfinite(np.frombuffer(values, np.float32)).all():
        raise CorruptFrame(f"{name} payload has a value that is not finite; a gradient that is not travels as fp16")


class TopK:
    """A share of the values, those of largest magnitude; all other values are 0."""

    biased, coarse, sparse = True, True, True

    def __init__(self, argument: str) -> None:
        self.name = f"topk:{argument}"
        self._density = density_of(argument)

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        found = values.numpy()
        index = largest(np.abs(found), count(self._density, len(found)))
        return index.astype(np.int32).data.cast("B"), found[index].data.cast("B")

    def check(self, payload: memoryview, numel: int) -> None:
        k = count(self._density, numel)
        check_size(self.name, payload, 8 * k)
        index = np.frombuffer(payload, np.int32, k)
        if (index[1:] <= index[:-1]).any():
            raise CorruptFrame(f"{self.name} payload has indices that do not increase")
        if index[0] < 0 or index[-1] >= numel:
            raise CorruptFrame(
                f"{self.name} payload has indices from {index[0]} to {index[-1]}; this bucket has 0 to {numel - 1}"
            )
        check_finite(self.name, payload[4 * k :])

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        k = len(payload) // 8
        scratch.zero_().numpy()[np.frombuffer(payload, np.int32, k)] = np.frombuffer(payload, np.float32, k, 4 * k)
        return scratch
