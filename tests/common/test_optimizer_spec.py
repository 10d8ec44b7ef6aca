"""Optimizers by name and plain values, and why exactly these: each treats every element alone."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


NUMBERS = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay"),
    "Adam": ("lr", "eps", "weight_decay"),
    "AdamW": ("lr", "eps", "weight_decay"),
    "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "Adamax": ("lr", "eps", "weight_decay"),
    "NAdam": ("lr", "eps", "weight_decay", "momentum_decay"),
    "RAdam": ("lr", "eps", "weight_decay"),
    "Adadelta": ("lr", "rho", "eps", "weight_decay"),
    "Rprop": ("lr",),
    "ASGD": ("lr", "lambd", "alpha", "t0", "weight_decay"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_flag_in_the_place_of_a_number_is_refused(name: str) -> None:
    """To Python True is a number; torch fails with it in the middle of a step."""
    for key in NUMBERS[name]:
        for value in (True, False, TypedNumber("torch.bool", 1)):
            with pytest.raises(ConfigError, match=rf"torch\.optim\.{name}: {key} is .*; it has to be a number"):
                optim.check_change(name, {}, {key: value})
            with pytest.raises(ConfigError, match=rf"torch\.optim\.{name}: {key} is .*; it has to be a number"):
                optim.check(name, {key: value})
    with pytest.raises(ProtocolError, match="lr is True; it has to be a number"):
        optim.changes_from_proto(name, {"lr": pb.HyperValue(flag=True)})


#: Values that no schedule brings, of any type that travels.
STRANGE = st.one_of(
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1 - 2.0**-53, 1 - 2.0**-30, 5e-324, 1e20, -1e20, 0.0]),
    st.sampled_from(
        [
            TypedNumber("torch.int8", -1),
            TypedNumber("torch.uint8", 255),
            TypedNumber("torch.float16", 0.5),
            TypedNumber("numpy.float16", 0.5),
        ]
    ),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_step_fails_with_values_that_are_not_refused(data: st.DataObject) -> None:
    """Whatever workers push by turns, the one optimizer of a bucket makes every step."""
    name = data.draw(st.sampled_from(ELEMENTWISE))
    names = sorted(optim.arguments_of(name))
    job: optim.Hyper = {"foreach": False}
    optimizer = optim.build(name, [parameter := torch.ones(3)], job)
    for _ in range(6):
        changes = data.draw(st.dictionaries(st.sampled_from(names), STRANGE, max_size=2))
        hyper = {**job, "lr": data.draw(st.sampled_from([0.5, -1e6, 0.0, 1e6])), **changes}
        with contextlib.suppress(ConfigError):
            optim.check_change(name, job, hyper)
            parameter.grad = torch.randn(3)
            optimizer.param_groups[0].update(optim.live(hyper))
            optimizer.step()


def test_integers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="lr=2000000000000000000000 does not fit into 64 bits"):
        OptimizerSpec("SGD", lr=2 * 10**21)
    with pytest.raises(ConfigError, match=r"betas=.* cannot be sent"):
        OptimizerSpec("Adam", betas=(10**400, 0.5))


@pytest.mark.parametrize(
    ("kind", "value"), [("torch.int8", 300), ("torch.uint8", -1), ("torch.float16", 1e20), ("torch.int64", 0.5)]
)
def test_typed_number_that_its_type_does_not_have_is_refused(kind: str, value: float) -> None:
    with pytest.raises(ProtocolError, match=f"which no {kind} is"):
        optim.hyper_from_proto({"lr": pb.HyperValue(number=value, type=kind)})


def test_many_groups_that_differ_in_unusual_values_are_refused() -> None:
    optim.check_groups("SGD", ({"lr": 0.5 / (1 + number)} for number in range(1000)))
    with pytest.raises(ConfigError, match="more than 256 parameter groups differ in more than lr"):
        optim.check_groups("SGD", ({"dampening": 0.5 / (1 + number)} for number in range(1000)))


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
    for brought, sent in (
        ([0.5, 0.75], (0.5, 0.75)),
        (torch.tensor([0.5, 0.75]), both),
        ((torch.tensor(0.5), 0.75), (both[0], 0.75)),
    ):
        hyper = optim.hyper_of("NAdam", {"betas": brought}, frozenset(["betas"]))
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
