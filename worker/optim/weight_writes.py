"""Finds what the training loop has written to weights since the last step, for the servers to go on from.

Weights that a loop clamps, projects, masks, averages or loads count as they do in torch: the next forward sees them,
and the next step starts from them. They are found by contents, because ``.data``, numpy and dlpack leave no trace.
"""

from collections.abc import Sequence

import torch

from torch_ps.common.codecs.plain import bytes_of
from torch_ps.common.plan import Bucket, Piece, Plan
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.session.session import Written


class WeightWrites:
    """The weights of one model that a loop may write to.

    Args:
        plan: buckets of the job.
        parameters: trained parameters, the first tensors of ``flat``; they are tracked from now on.
        flat: tensors of the model.
    """

    def __init__(self, plan: Plan, parameters: Sequence[torch.Tensor], flat: FlatTensors) -> None:
        self._parameters, self._flat = parameters, flat
        self._pieces: list[list[tuple[Bucket, int, Piece]]] = [[] for _ in parameters]
        for bucket in plan.buckets:
            for at, piece in enumerate(bucket.pieces if bucket.rule == "optimizer" else ()):
                self._pieces[piece.tensor].append((bucket, at, piece))
        flat.track(range(len(parameters)))

    def find(self) -> dict[int, Written]:
        """What has been written since the last step, by number of the bucket."""
        self._flat.follow()
        found: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for index in self._flat.written():
            values = self._parameters[index].detach().reshape(-1)
            for bucket, at, piece in self._pieces[index]:
                found.setdefault(bucket.index, []).append((at, values[piece.start : piece.stop]))
        return {bucket: _written(sorted(pieces, key=lambda each: each[0])) for bucket, pieces in found.items()}

    def keep(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of the parameters that have been written to since the last step: each parameter and its values."""
        written = [self._parameters[index] for index in self._flat.written()]
        return [(parameter, parameter.detach().clone()) for parameter in written]


def _written(pieces: Sequence[tuple[int, torch.Tensor]]) -> Written:
    values = torch.cat([part.to("cpu", torch.float32) for _, part in pieces])
    return Written([at for at, _ in pieces], bytes_of(values))
