"""Models by description: what is refused, which difference is named, and the way over the wire."""

import pytest
import torch

from torch_ps.common import schema
from torch_ps.common.errors import ConfigError, ModelMismatch, ProtocolError
from torch_ps.common.optimizer_spec import HyperValue
from torch_ps.common.schema import Group, Model, TensorSpec

W, B, E = TensorSpec("w", (3, 4)), TensorSpec("b", (4,)), TensorSpec("e", ())
HYPER: dict[str, HyperValue] = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "maximize": True,
    "weight_decay": 3,
    "foreach": None,
}


def model(*tensors: TensorSpec, optimizer: str = "SGD", buffers: tuple[TensorSpec, ...] = ()) -> Model:
    return Model(optimizer, (Group(tensors, {"lr": 0.1}),), buffers)


def test_model_comes_back_from_the_wire_as_it_was() -> None:
    sent = Model("AdamW", (Group((W, E), HYPER), Group((B,), {})), (TensorSpec("count", (), "int64"),))
    found = schema.from_proto(schema.to_proto(sent))
    assert found == sent
    assert {key: type(value) for key, value in found.groups[0].hyper.items()} == {
        key: type(value) for key, value in HYPER.items()
    }


def test_spec_describes_a_tensor() -> None:
    spec = TensorSpec.of("w", torch.zeros(2, 3, dtype=torch.bfloat16))
    assert (spec, spec.numel, str(spec)) == (TensorSpec("w", (2, 3), "bfloat16"), 6, "'w' [2, 3] bfloat16")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (model(), "the model has no trainable parameter"),
        (model(TensorSpec("w", (0,))), "no trainable parameter"),
        (model(W, W), "two tensors are named 'w'"),
        (model(W, buffers=(W,)), "two tensors are named 'w'"),
        (model(TensorSpec("", (1,))), "a tensor name has 0 characters"),
        (model(TensorSpec("x" * 1001, (1,))), "a tensor name has 1001 characters; 1 to 1000"),
        (model(TensorSpec("w", (1,), "complex64")), r"'w' \[1\] complex64 has a dtype that cannot be served"),
        (Model("SGD", (Group((W,), {"weight_decay": True}),)), "SGD: weight_decay is True; it has to be a number"),
        (Model("SGD", (Group((W,), {"lr": 0.5}), Group((B,), {"lr": True}))), "SGD: lr is True; it has to be"),
        (Model("x", (Group((W,), {}),)), "torch.optim.x cannot run on slices"),
        (model(TensorSpec("w", (2, -1))), r"'w' \[2, -1\] float32 has a negative size"),
        (model(TensorSpec("w", (1 << 41,))), "the limits are 100000 and 2"),
    ],
)
def test_model_that_cannot_be_served_is_refused(bad: Model, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema.check(bad)
    with pytest.raises(ProtocolError, match=f"the model cannot be served: .*{message}"):
        schema.from_proto(schema.to_proto(bad))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (model(TensorSpec("w", (4, 3)), B), r"'w7' has tensor 'w' \[4, 3\] float32 where the job has 'w' \[3, 4\]"),
        (model(W, TensorSpec("c", (4,))), r"has tensor 'c' \[4\] float32 where the job has 'b' \[4\] float32"),
        (model(W, TensorSpec("b", (4,), "float16")), r"'b' \[4\] float16 where the job has 'b' \[4\] float32"),
        (model(W), r"only the job has tensor 'b' \[4\]"),
        (model(W, B, E), r"only worker 'w7' has tensor 'e' \[\]"),
        (model(W, B, buffers=(E,)), r"only worker 'w7' has tensor 'e'"),
        (model(W, B, optimizer="Adam"), "'w7' brings the optimizer Adam; the job uses SGD"),
        (Model("SGD", (*model(W, B).groups, Group((), {}))), "'w7' has 2 parameter groups; the job has 1"),
    ],
)
def test_first_difference_between_two_models_is_named(theirs: Model, message: str) -> None:
    with pytest.raises(ModelMismatch, match=message):
        schema.check_same(model(W, B), theirs, "w7")


def test_hyperparameters_may_differ() -> None:
    schema.check_same(Model("SGD", (Group((W,), {"lr": 0.1}),)), Model("SGD", (Group((W,), {"lr": 0.2}),)), "w7")
