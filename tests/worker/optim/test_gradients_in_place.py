"""Gradients that are sent from where they are, without a copy of their own."""

import signal

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import job, until
from tests.support.threads import spawn
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import LARGE, gather, in_place

LR = 0.25
HYPER: Hyper = {"lr": LR}


def gradients() -> list[torch.Tensor | None]:
    """One of each kind, large and small."""
    side = 4 * int(LARGE**0.5)
    square = torch.randn(side, side)
    return [
        torch.randn(7),
        square,
        torch.randn(side, side).t(),
        None,
        torch.randn(3),
        torch.randn(5),
        torch.randn(2 * LARGE).bfloat16(),
        square[: side // 2],  # shares the memory of another one
        torch.randn(1, 8, 64, 64).to(memory_format=torch.channels_last),
        torch.randn(LARGE),
        torch.randn(2, 2 * LARGE).to_sparse(),
    ]


def test_parts_of_every_bucket_are_what_gather_copies() -> None:
    torch.manual_seed(3)
    found = gradients()
    shapes = [(LARGE, 2) if each is None else tuple(each.shape) for each in found]
    specs = tuple(TensorSpec(f"t{number}", shape, "float32") for number, shape in enumerate(shapes))
    in_parts = 0
    for bucket in plan(Model("SGD", (Group(specs, HYPER),)), 1 << 18, 1).buckets:
        whole = gather(bucket, found, torch.empty(bucket.numel))
        parts = in_place(bucket, dict(enumerate(found)))
        if parts is not None:
            in_parts += 1
            assert torch.equal(torch.cat(parts), whole)
            homes = [each.untyped_storage().data_ptr() for each in found if each is not None and not each.is_sparse]
            assert any(part.untyped_storage().data_ptr() in homes for part in parts)
    assert in_parts > 2


class Net(nn.Module):
    """Large and small parameters; more bytes than the buffers of a connection hold."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.large, self.small = nn.Parameter(torch.zeros(numel)), nn.Parameter(torch.zeros(3))


def test_gradients_that_change_after_a_step_was_given_up_are_not_what_is_applied() -> None:
    """The server stands still until the step is given up, so that most of the gradient has not left by then."""
    with job(workers=2, lease=120.0) as servers:

        def wrapped(name: str, timeout: float) -> torch_ps.ParameterServerOptimizer:
            net = Net(4 << 20)
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            inner = torch.optim.SGD(net.parameters(), lr=LR)
            return torch_ps.ParameterServerOptimizer(
                inner, net, str(servers), name=name, timeout=timeout, plane="network"
            )

        joining = spawn(lambda: wrapped("w1", 60.0))
        first = wrapped("w0", 0.5)
        second = joining.result(60)
        servers.processes[0].send(signal.SIGSTOP)
        given_up = spawn(first.step)
        with pytest.raises(torch_ps.PsError):
            given_up.result(60)
        for group in first.param_groups:
            for parameter in group["params"]:
                parameter.grad.fill_(7.0)
        servers.processes[0].send(signal.SIGCONT)
        second.step()
        until(lambda: servers.status().version == 1, "the step is applied")
        for group in second.param_groups:
            for parameter in group["params"]:
                assert torch.equal(parameter.detach(), torch.full_like(parameter, -LR))
        second.close()
        first.close()


@pytest.mark.parametrize("codec", ["none", "fp16", "bf16"])
@pytest.mark.parametrize("odd", [None, float("inf"), float("nan"), 1e30])
def test_parts_are_encoded_as_the_whole_and_left_alone(codec: str, odd: float | None) -> None:
    torch.manual_seed(5)
    parts = [torch.randn(40), torch.randn(LARGE) * 1e-6, torch.zeros(3)]
    if odd is not None:
        parts[1][7] = odd
    before = [part.clone() for part in parts]
    bucket = plan(Model("SGD", (Group((TensorSpec("x", (LARGE + 43,), "float32"),), HYPER),)), 1 << 22, 1).buckets[0]
    compressor = Compressor(codec)
    whole = compressor.encode(bucket, torch.cat(parts), step=0, weight=1.0)
    encoded = compressor.encode_parts(bucket, parts)
    assert encoded is not None
    assert encoded[0] is whole[0]
    assert b"".join(encoded[1]) == b"".join(whole[1])
    assert all(
        torch.equal(part.view(torch.int32), same.view(torch.int32)) for part, same in zip(parts, before, strict=True)
    )
