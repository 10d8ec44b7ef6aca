"""What watches or corrects gradients takes a piece without one for what it is: no information, not a zero."""

import pytest
import torch

from torch_ps.common.plan import Bucket, Piece
from torch_ps.ps.core.effects import Apply, Contribution
from torch_ps.ps.core.lr_stability import Reading
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.divergence_monitor import DivergenceMonitor
from torch_ps.ps.engine.parameter_store import Mean

#: Two tensors of 64 elements.
BUCKET = Bucket(0, 0, "optimizer", 0, 128, (Piece(0, 0, 64, 0), Piece(1, 0, 64, 64)))
FIRST, SECOND = slice(0, 64), slice(64, 128)
CURVATURE, LR, WORKERS = 0.5, 0.1, 2


def applied(version: int, staleness: int) -> Apply:
    return Apply(0, version + 1, (Contribution(f"w{version % WORKERS}", 1, 0, 1.0, staleness),), "")


def test_compensation_keeps_the_mean_of_squares_of_a_piece_without_a_gradient() -> None:
    compensator = Compensator(0.5, adaptive=True)
    compensator.keep(Roster(members=(Member("w0", 1, 0, 0),)))
    compensator.pulled(0, "w0", 1, 0, torch.ones(128))
    compensator.correct(BUCKET, applied(0, 0), Mean(torch.ones(128)), torch.ones(128))
    squares = compensator.squares(0)
    assert squares is not None
    before = squares.clone()
    gradient = torch.ones(128)
    gradient[SECOND] = 0.0
    found = compensator.correct(BUCKET, applied(0, 0), Mean(gradient, (1,)), torch.full((128,), 2.0))
    assert torch.equal(squares[SECOND], before[SECOND])
    assert (squares[FIRST] > before[FIRST]).all()
    assert found.absent == (1,)
    assert (found.values[FIRST] > 1.0).all()
    assert not found.values[SECOND].any()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_monitor_measures_the_curvature_of_what_has_gradients(every: int) -> None:
    """A quadratic loss of known curvature; the second tensor has a gradient in every ``every``-th push alone."""
    readings: list[Reading] = []
    monitor = DivergenceMonitor(
        [BUCKET], scaled=False, num_workers=lambda: WORKERS, advise=print, report=readings.append
    )
    values = torch.ones(128) + torch.linspace(0.0, 1.0, 128)
    pulled = {rank: (0, values.clone()) for rank in range(WORKERS)}
    for version in range(400):
        rank = version % WORKERS
        base, copy = pulled[rank]
        gradient = CURVATURE * copy
        absent = () if version % every == 0 else (1,)
        if absent:
            gradient[SECOND] = 0.0
        observe = monitor.observer(0, applied(version, version - base), {"lr": LR})
        if observe is not None:
            observe(gradient, values, absent)
        values = values - LR * gradient
        pulled[rank] = version + 1, values.clone()
    assert readings
    assert all(reading.curvature == pytest.approx(CURVATURE, rel=0.01) for reading in readings)
