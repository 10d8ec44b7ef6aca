"""Optimizers by name and plain values, and why exactly these: each treats every element alone."""

import math

import numpy as np
import pytest
import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.errors import ConfigError, ProtocolError
from torch_ps.common.optimizer_spec import ELEMENTWISE, OptimizerSpec
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.typed_numbers import TypedNumber


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
    spec = OptimizerSpec("Adam", lr=torch.tensor(0.5), betas=[0.5, 0.75], capturable=False, fused=True)  # type: ignore[arg-type]
    assert spec.hyper == {"lr": TypedNumber("torch.float32", 0.5), "betas": (0.5, 0.75), "fused": True}
    assert repr(OptimizerSpec("SGD", lr=0.1)) == "OptimizerSpec('SGD', lr=0.1)"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (torch.tensor([0.5]), TypedNumber("torch.float32", 0.5)),
        (torch.tensor(1), TypedNumber("torch.int64", 1)),
        (torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16)), TypedNumber("torch.bfloat16", 0.5)),
        (np.float32(0.5), TypedNumber("numpy.float32", 0.5)),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
    ],
)
def test_numbers_of_torch_and_numpy_travel_with_their_type_where_it_rounds(
    given: object, sent: optim.HyperValue
) -> None:
    hyper = optim.hyper_of("SGD", {"lr": given}, frozenset(["lr"]))
    assert (hyper["lr"], type(hyper["lr"])) == (sent, type(sent))
    assert optim.hyper_from_proto(optim.hyper_to_proto(hyper)) == hyper
    live = optim.live(hyper)["lr"]
    assert getattr(live, "dtype", None) == getattr(given, "dtype", None) or isinstance(sent, float | int)


def test_betas_may_be_a_list_numbers_of_torch_or_one_tensor() -> None:
    both = (TypedNumber("torch.float32", 0.5), TypedNumber("torch.float32", 0.75))
    for given, sent in (
        ([0.5, 0.75], (0.5, 0.75)),
        (torch.tensor([0.5, 0.75]), both),
        ((torch.tensor(0.5), 0.75), (both[0], 0.75)),
    ):
        hyper = optim.hyper_of("NAdam", {"betas": given}, frozenset(["betas"]))
        assert hyper["betas"] == sent
        assert optim.hyper_from_proto(optim.hyper_to_proto(hyper)) == hyper


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3, 0), r"a tensor of shape \[3, 0\] is no number"),
        (np.longdouble(1), r"'numpy\.float\d+' is no type"),
        (torch.tensor(torch.nan), "a hyperparameter is nan"),
        (torch.tensor(1j), r"'torch\.complex64' is no type"),
    ],
)
def test_number_that_cannot_be_sent_is_named(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"torch\.optim\.SGD: lr=.* cannot be sent: {words}"):
        optim.hyper_of("SGD", {"lr": value}, frozenset(["lr"]))


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "ASGD"])
def test_negative_lr_is_refused_in_a_new_optimizer_and_taken_by_a_running_one(name: str) -> None:
    with pytest.raises(ConfigError, match="Invalid learning rate: -0\\.5"):
        OptimizerSpec(name, lr=-0.5)
    optim.check_change(name, {"lr": 0.5}, {"lr": -0.5})
    assert optim.build(name, [torch.zeros(1)], {"lr": -0.5}).param_groups[0]["lr"] == -0.5


def test_asgd_takes_no_negative_lr_for_its_own_formula_has_no_value_then() -> None:
    with pytest.raises(ConfigError, match=r"ASGD: lr has to be in \[0, 1e\+20\]; got -0\.5"):
        optim.check_change("ASGD", {"lr": 0.5}, {"lr": -0.5})


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
        (pb.HyperValue(number=1, type="torch.load"), "'lr': 'torch.load' is no type of a hyperparameter"),
        (pb.HyperValue(numbers=pb.NumberList(value=[1, 2], type=["torch.float32"])), "'lr' has 2 numbers and 1 types"),
    ],
)
def test_hyperparameter_that_is_no_value_is_refused(value: pb.HyperValue, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        optim.hyper_from_proto({"lr": value})
