"""The two models of all benchmarks: parameters without a network.

big: 148 tensors in the shapes of a GPT, 24,999,936 parameters, 100.0 MB of fp32. small: 39 tensors, 10,000 parameters.
"""

import torch


def shapes(size: str) -> list[tuple[int, ...]]:
    """Shapes of "big" or "small"."""
    width, blocks, vocabulary, context = (384, 12, 9394, 256) if size == "big" else (16, 3, 8, 0)
    found: list[tuple[int, ...]] = [(vocabulary, width)]
    if context:
        found.append((context, width))
    for _ in range(blocks):
        found += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        found += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*found, (width,), (width,)]


class Model(torch.nn.Module):
    """Parameters of the given shapes, uniform in [-.5, .5), with gradients of the same distribution, seeded."""

    def __init__(self, size: str, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tensors = torch.nn.ParameterList(
            torch.nn.Parameter(torch.rand(shape, generator=generator) - 0.5) for shape in shapes(size)
        )
        for tensor in self.tensors:
            tensor.grad = torch.rand(tensor.shape, generator=generator) - 0.5
