"""Pushes that lack the gradient of a piece: torch's bits frame by frame, and nothing of what is impossible is applied.

The reference is ``torch.optim.SGD`` in one process on separate tensors.
"""

import random
from collections.abc import Sequence

import pytest
import torch

from tests.support.jobs import job
from tests.support.raw_worker import raw_workers
from torch_ps.common.errors import CorruptFrame
from torch_ps.common.optimizer_spec import Hyper

PARAMS = {"a": torch.linspace(-1.0, 1.0, 8), "b": torch.linspace(2.0, 3.0, 5), "c": torch.linspace(0.0, 1.0, 6)}
SIZES = [each.numel() for each in PARAMS.values()]
HYPER: Hyper = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125, "dampening": 0.25}
STEPS = 12


def gradient(seed: int) -> torch.Tensor:
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed))


class Reference:
    """Plain torch in one process, which clips the mean gradient to ``clip_norm``; 0 does not clip."""

    def __init__(self, clip_norm: float = 0.0) -> None:
        self._parameters = [torch.nn.Parameter(each.clone()) for each in PARAMS.values()]
        self._optimizer, self._clip_norm = torch.optim.SGD(self._parameters, **HYPER), clip_norm  # type: ignore[arg-type]

    def step(self, gradients: Sequence[torch.Tensor], absent: Sequence[Sequence[int]]) -> torch.Tensor:
        """Step with the mean; who has no gradient counts as 0, and what nobody has one for is left alone."""
        terms = [torch.split(each, SIZES) for each in gradients]
        for at, parameter in enumerate(self._parameters):
            has = [
                torch.zeros(SIZES[at]) if at in lacks else term[at] for term, lacks in zip(terms, absent, strict=True)
            ]
            nobody = all(at in lacks for lacks in absent)
            parameter.grad = None if nobody else (has[0] + has[1]) / 2
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        return torch.cat([each.detach() for each in self._parameters])


def lots(step: int) -> list[list[int]]:
    draw = random.Random(step)
    return [[at for at in range(len(SIZES)) if draw.random() < 0.6] for _ in range(2)]


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_values_of_absent_pieces_are_ignored_whatever_they_are(clip_norm: float) -> None:
    plain = Reference(clip_norm)
    with (
        job(workers=2, clip_norm=clip_norm) as servers,
        raw_workers(servers, PARAMS, ("w0", "w1"), hyper=HYPER) as workers,
    ):
        for worker in workers:
            worker.pull(0)
        for step in range(STEPS):
            absent, gradients = lots(step), [gradient(2 * step + rank) for rank in range(2)]
            for worker, values, lacks in zip(workers, gradients, absent, strict=True):
                worker.push(0, values, absent=lacks)  # with other values than 0 where it lacks them
            expected = plain.step(gradients, absent)
            for worker in workers:
                found = worker.answer().values
                assert torch.equal(found, expected) if not clip_norm else torch.allclose(found, expected, rtol=1e-6)


def test_positions_that_no_piece_has_or_that_do_not_grow_are_refused_before_anything_changes() -> None:
    with job() as servers, raw_workers(servers, PARAMS, hyper=HYPER) as (worker,):
        before = worker.pull(0).values
        for absent in ([3], [1, 0], [0, 0], [2**32 - 1]):
            worker.push(0, gradient(1), absent=absent)
            with pytest.raises(CorruptFrame, match="in bucket 0 of 3 pieces; positions grow"):
                worker.answer()
            worker.open()
            assert torch.equal(worker.pull(0).values, before)
        worker.push(0, gradient(1), absent=[0, 2])
        found = worker.answer().values
        assert torch.equal(found[:8], before[:8])
        assert not torch.equal(found[8:13], before[8:13])
        assert torch.equal(found[13:], before[13:])
