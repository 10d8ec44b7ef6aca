"""randk: values at places that lots decide, and the seed of the lots; of d values k = density * d, d / k times smaller.

    payload: [ seed, uint64 | value of each place, fp32, in the order of places ]        all other values are 0

The d values are cut into k nearly equal runs and one of each run is drawn, so the places need no sorting and no check
for repeats, and both ends compute them in O(k). Every value is drawn equally often, so with error feedback each one
arrives in the end; the values are not scaled up by d / k, which without feedback would be needed.

Source: Stich et al., NeurIPS 2018, arXiv:1809.07599; the lots are SplitMix64, Steele et al., OOPSLA 2014.
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


def places(seed: int, k: int, numel: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """``k`` of ``numel`` places, increasing; the same on every machine.

    Args:
        seed: 0 to 2**64 - 1.
    """
    runs = np.arange(k + 1, dtype=np.uint64) * np.uint64(numel) // np.uint64(k)
    lots = np.arange(1, k + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed)
    lots = (lots ^ (lots >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    lots = (lots ^ (lots >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    lots ^= lots >> np.uint64(31)
    return (runs[:-1] + lots % (runs[1:] - runs[:-1])).astype(np.int64)


class RandK:
    biased, coarse, sparse = True, True, True

    def __init__(self, argument: str) -> None:
        self.name = f"randk:{argument}"
        self._density = density_of(argument)

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        found, seed = values.numpy(), seed & _MASK
        return _SEED.pack(seed), found[places(seed, count(self._density, len(found)), len(found))].data.cast("B")

    def check(self, payload: memoryview, numel: int) -> None:
        check_size(self.name, payload, _SEED.size + 4 * count(self._density, numel))
        check_finite(self.name, payload[_SEED.size :])

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        (seed,) = _SEED.unpack_from(payload)
        values = np.frombuffer(payload, np.float32, offset=_SEED.size)
        scratch.zero_().numpy()[places(seed, len(values), scratch.numel())] = values
        return scratch
