"""A hyperparameter of a push holds for its step alone: what a later push leaves out is as in the model."""

import pytest
import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.engine.bucket_optimizer import BucketOptimizer

#: A Client names what it wants to, so a model may lack any but these.
JOB: Hyper = {"lr": 0.25}


def stepped(name: str, *steps: Hyper) -> torch.Tensor:
    """Parameters after steps with these changes, each of which is checked as that of a push."""
    model = Model(name, (Group((TensorSpec("a", (8,)),), JOB),))
    values = torch.ones(8)
    optimizer = BucketOptimizer(name, plan(model, 1 << 20, 1).buckets[0], values, JOB)
    for changes in steps:
        optim.check_change(name, JOB, JOB | changes)
        optimizer.step(torch.ones(8), JOB | changes, 1.0)
    return values


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_sets_of_values_that_are_good_by_themselves_are_good_one_after_the_other(name: str) -> None:
    typed = optim.hyper_from_proto({"lr": pb.HyperValue(number=0.5, type="torch.float32")})  # a tensor
    assert stepped(name, {"foreach": True}, typed, {}).isfinite().all()


def test_value_that_a_later_push_does_not_name_is_that_of_the_model() -> None:
    assert stepped("SGD", {"maximize": True}, {}).tolist() == [1.0] * 8
    assert stepped("SGD", {"weight_decay": 1.0, "lr": 0.0}, {}).tolist() == [0.75] * 8
