"""Deep gradient compression: momentum correction and warm-up, with which sparse gradients train as well as whole ones.

Momentum correction. A value that is sent once in a hundred steps should arrive with the momentum that it would have had
in each of them. So the worker computes the momentum, before the residual, and the server runs without:

    velocity = momentum * velocity + gradient        sent = C(velocity + residual)
    where a value was sent: velocity = 0             (momentum factor masking: stale momentum would carry it on)

Warm-up. In the first steps gradients are large and change fast, so more of them is sent: 25 %, 6.25 %, 1.56 %, ... in
equally long stages, down to the density of the codec.

Memory: one fp32 copy of the parameters per worker, beside that of error feedback.

Source: Lin et al., ICLR 2018, arXiv:1712.01887, sections 3.1 to 3.3.
"""

from collections.abc import Mapping, Sequence

import torch

from torch_ps.common.codecs.registry import density_of
from torch_ps.common.optimizer_spec import HyperValue

#: First density of the warm-up, and the factor from one stage to the next.
_FIRST, _FACTOR = 0.25, 0.25


def has_density(codec: str) -> bool:
    """Whether a codec sends a part of the values that its text chooses."""
    return codec.partition(":")[0] in ("topk", "randk")


def warmup_codec(codec: str, step: int, steps: int) -> str:
    """The codec of one step, where the first ``steps`` steps are a warm-up for ``codec``, such as "topk:0.01".

    >>> [warm("topk:0.01", step, 6) for step in (0, 1, 2, 3, 4, 5, 6)]
    ['topk:0.25', 'topk:0.25', 'topk:0.0625', 'topk:0.0625', 'topk:0.015625', 'topk:0.015625', 'topk:0.01']
    """
    if step >= steps:
        return codec
    kind, _, argument = codec.partition(":")
    target, stages, density = density_of(argument), [], _FIRST
    while density > target:
        stages.append(density)
        density *= _FACTOR
    return f"{kind}:{stages[step * len(stages) // steps]:g}" if stages else codec


class MomentumCorrection:
    """The momentum of one worker, by number of the bucket, in place of the server's ``torch.optim.SGD``."""

    #: Hyperparameters of each push: the server's momentum is off, and the decay is in the gradient already.
    HYPER: Mapping[str, HyperValue] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}

    def __init__(self) -> None:
        self._velocity: dict[int, torch.Tensor] = {}

    @staticmethod
    def fits(optimizer: str, hyper: Mapping[str, HyperValue]) -> bool:
        """Whether the optimizer's momentum can be computed here: that of SGD, not dampened and not ascending."""
        return (
            optimizer == "SGD"
            and bool(hyper.get("momentum"))
            and not hyper.get("dampening")
            and not hyper.get("maximize")
        )

    def accumulate(
        self, bucket: int, gradient: torch.Tensor, hyper: Mapping[str, HyperValue], spans: Sequence[slice]
    ) -> None:
        """Turn ``gradient``, which holds the decay already, into the step that SGD would make of it, in place.

        Args:
            bucket: number of the bucket.
            gradient: gradient, shape (numel,), fp32; zeros outside ``spans``.
            hyper: hyperparameters of SGD.
            spans: elements that have a gradient; the momentum of the others stays.
        """
        momentum = float(hyper["momentum"])  # type: ignore[arg-type]  # ``fits`` says that it is a number
        if bucket not in self._velocity:
            self._velocity[bucket] = torch.zeros_like(gradient)
        for span in spans:
            velocity, values = self._velocity[bucket][span], gradient[span]
            velocity.mul_(momentum).add_(values)
            if hyper.get("nesterov"):
                values.add_(velocity, alpha=momentum)
            else:
                values.copy_(velocity)

    def mask(self, bucket: int, decoded: torch.Tensor, spans: Sequence[slice]) -> None:
        """Forget the momentum of every value of ``spans`` that was sent."""
        for span in spans:
            self._velocity[bucket][span].masked_fill_(decoded[span] != 0, 0.0)
