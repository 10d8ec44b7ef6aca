"""randk: values at pseudo-random positions, and the seed; of d values k = density * d, d / k times smaller.

    payload: [ seed, uint64 | value at each position, fp32, in order ]        all other values are 0

The d values are divided into k nearly equal runs and one position of each run is drawn, so positions need no sorting
and no check for repeats, and both ends compute them in O(k). Every value is drawn equally often, so with error feedback
each one arrives in the end; values are not scaled by d / k, which would be needed without feedback.

Source: Stich et al., NeurIPS 2018, arXiv:1809.07599; the random numbers are SplitMix64, Steele et al., OOPSLA 2014.
"""

import struct

import numpy as np
import torch

from torch_ps.common.codecs.plain import check_size
from torch_ps.common.codecs.registry import count, density_of
from torch_ps.common.codecs.topk import check_finite
from torch_ps.common.wire.frames import Buffer

_SEED = struct.Struct("<Q")
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def draw_positions(seed: int, k: int, numel: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Draw ``k`` of ``numel`` positions; the same on every machine.

    Args:
        seed: seed of the draw, 0 to 2**64 - 1.
        k: number of positions, 1 to ``numel``.
        numel: number of values.

    Returns:
        shape (k,), int64, strictly increasing.
    """
    runs = np.arange(k + 1, dtype=np.uint64) * np.uint64(numel) // np.uint64(k)
    draws = np.arange(1, k + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed)
    draws = (draws ^ (draws >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    draws = (draws ^ (draws >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    draws ^= draws >> np.uint64(31)
    return (runs[:-1] + draws % (runs[1:] - runs[:-1])).astype(np.int64)


class RandK:
    """A share of the values at positions that a seed decides; all other values are 0."""

    biased, coarse, sparse = True, True, True

    def __init__(self, argument: str) -> None:
        self.name = f"randk:{argument}"
        self._density = density_of(argument)

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        found, seed = values.numpy(), seed & _MASK
        return _SEED.pack(seed), found[draw_positions(seed, count(self._density, len(found)), len(found))].data.cast(
            "B"
        )

    def check(self, payload: memoryview, numel: int) -> None:
        check_size(self.name, payload, _SEED.size + 4 * count(self._density, numel))
        check_finite(self.name, payload[_SEED.size :])

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        (seed,) = _SEED.unpack_from(payload)
        values = np.frombuffer(payload, np.float32, offset=_SEED.size)
        scratch.zero_().numpy()[draw_positions(seed, len(values), scratch.numel())] = values
        return scratch
