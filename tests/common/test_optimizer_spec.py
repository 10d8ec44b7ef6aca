"""Optimizers by name and plain values, and why exactly these: each treats every element alone."""

import math

import pytest
import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.errors import ConfigError, ProtocolError
from torch_ps.common.optimizer_spec import ELEMENTWISE, OptimizerSpec
from torch_ps.common.pb import parameter_server_pb2 as pb


def trained(name: str, tensors: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """``tensors`` after one step per list of gradients."""
    optimizer = optim.build(name, tensors, {"lr": 0.1})
    for step in gradients:
        for tensor, gradient in zip(tensors, step, strict=True):
            tensor.grad = gradient
        optimizer.step()
    return tensors


def cut(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[:32], tensor[32:64], tensor[64:]]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_slices_train_as_the_whole_does(name: str) -> None:
    start, gradients = torch.randn(70), torch.randn(8, 70)
    (whole,) = trained(name, [start.clone()], [[gradient] for gradient in gradients])
    slices = trained(name, cut(start.clone()), [cut(gradient) for gradient in gradients])
    assert torch.equal(torch.cat(slices), whole)


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "SparseAdam", "Muon", "Optimizer", "x"])
def test_any_other_class_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"torch\.optim\.{name} cannot run on slices .*these work: SGD, Adam"):
        OptimizerSpec(name)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"learning_rate": 1.0}, r"torch\.optim\.SGD has no argument 'learning_rate'"),
        ({"lr": -1.0}, r"torch\.optim\.SGD refuses its arguments: Invalid learning rate: -1\.0"),
        ({"lr": "fast"}, r"torch\.optim\.SGD: lr is 'fast'; it has to be a number"),
        ({"lr": {"a": 1}}, r"torch\.optim\.SGD: lr=.* cannot be sent"),
    ],
)
def test_bad_argument_is_refused_with_the_reason(hyper: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerSpec("SGD", **hyper)  # type: ignore[arg-type]


def test_spec_keeps_what_changes_the_result_and_drops_how_torch_runs_it() -> None:
    spec = OptimizerSpec("Adam", lr=torch.tensor(0.5), betas=[0.5, 0.75], foreach=True, fused=True)  # type: ignore[arg-type]
    assert spec.hyper == {"lr": 0.5, "betas": (0.5, 0.75), "fused": True}
    assert repr(OptimizerSpec("SGD", lr=0.1)) == "OptimizerSpec('SGD', lr=0.1)"


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_live_optimizer_is_described_so_that_it_can_be_built_again(name: str) -> None:
    live = getattr(torch.optim, name)([torch.zeros(2, requires_grad=True)], lr=0.25)
    torch.optim.lr_scheduler.LambdaLR(live, lambda _: 1.0)  # leaves initial_lr in the group
    described, (hyper,) = optim.describe(live)
    assert (described, hyper["lr"]) == (name, 0.25)
    again = optim.build(described, [torch.zeros(2)], hyper)
    assert optim.describe(again) == (name, [hyper])


def test_changed_values_alone_travel_with_a_push() -> None:
    assert optim.changed_values({"lr": 0.2, "momentum": 0.9, "new": None}, {"lr": 0.1, "momentum": 0.9}) == {
        "lr": 0.2,
        "new": None,
    }


def test_hyperparameters_come_back_from_the_wire_with_their_types() -> None:
    sent: optim.Hyper = {"a": 1, "b": 1.5, "c": True, "d": None, "e": "text", "f": (0.5, 0.25)}
    found = optim.hyper_from_proto(optim.hyper_to_proto(sent))
    assert [(key, type(value), value) for key, value in found.items()] == [
        (key, type(value), value) for key, value in sent.items()
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (pb.HyperValue(number=math.nan), "'lr' is nan; a finite number is needed"),
        (pb.HyperValue(), "'lr' has no value"),
    ],
)
def test_hyperparameter_that_is_no_value_is_refused(value: pb.HyperValue, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        optim.hyper_from_proto({"lr": value})
