"""Error feedback and momentum of a piece that has no gradient wait for the next one."""

import pytest
import torch

from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket, Piece
from torch_ps.worker.gradients.compressor import Compressor

#: Two tensors of 32 elements.
BUCKET = Bucket(0, 0, "optimizer", 0, 64, (Piece(0, 0, 32, 0), Piece(1, 0, 32, 32)))
SECOND = slice(32, 64)


def encode(compressor: Compressor, step: int, scale: float, absent: tuple[int, ...], momentum: Hyper | None) -> None:
    """Gradients of which the second tensor's are ``scale`` times as large; 7 where there is none, as with decay."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(step))
    values[SECOND] *= scale
    if absent:
        values[SECOND] = 7.0
    compressor.encode(BUCKET, values, step=step, weight=1.0, momentum=momentum, absent=absent)


@pytest.mark.parametrize("compress", ["topk:0.1", "sign", "int8"])
def test_residual_of_a_tensor_stays_in_a_step_without_its_gradient(compress: str) -> None:
    compressor = Compressor(compress, feedback="on")
    for step in range(6):
        encode(compressor, step, 1.0, (), None)
        kept = compressor.residual(BUCKET)[SECOND].clone()
        encode(compressor, step, 1.0, (1,), None)
        assert kept.any()
        assert torch.equal(compressor.residual(BUCKET)[SECOND], kept)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_a_tensor_stays_in_a_step_without_its_gradient(nesterov: bool) -> None:
    """Its values are too small to be sent, so its residual is the sum of its momenta."""
    found = []
    for idle in (False, True):
        compressor = Compressor("topk:0.1", feedback="on")
        for step in range(6):
            encode(compressor, step, 1e-6, (), {"momentum": 0.9, "nesterov": nesterov})
            if idle:
                encode(compressor, step, 1e-6, (1,), {"momentum": 0.9, "nesterov": nesterov})
        found.append(compressor.residual(BUCKET)[SECOND].clone())
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize("compress", ["sign", "int8"])
def test_dropped_push_gives_nothing_back_to_a_tensor_without_gradient(compress: str) -> None:
    compressor = Compressor(compress, feedback="on")
    encode(compressor, 0, 1.0, (), None)
    kept = compressor.residual(BUCKET)[SECOND].clone()
    codec, parts = compressor.encode(BUCKET, torch.ones(64), step=1, weight=1.0, absent=(1,))
    compressor.put_back(BUCKET, codec, memoryview(b"".join(parts)), (1,))
    assert torch.equal(compressor.residual(BUCKET)[SECOND], kept)
