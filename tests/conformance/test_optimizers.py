"""Every elementwise optimizer of torch.optim gives, in slices on a server, the bits it gives on the whole model.

The slices are as awkward as they come: small buckets, tensors of odd sizes, several groups, one shard or three. The
reference is torch itself, in one process, on whole tensors.

Source: torch.optim; the default implementation against the default one, fused against fused.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import torch_ps
from tests.support.jobs import job
from torch_ps.common import codecs
from torch_ps.common import optimizer_spec as optim
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.engine.parameter_store import Gradient, Store

Tensors = dict[str, torch.Tensor]
Hyper = dict[str, Any]

SHAPES = {"weight": (37, 29), "bias": (29,), "scale": (), "table": (400, 5), "odd": (7, 3), "kernel": (3, 3, 5, 5)}
NAMES = tuple(SHAPES)
GROUPS = (NAMES[:3], NAMES[3:])
STEPS = 30

CASES: dict[str, tuple[str, Hyper]] = {
    "SGD": ("SGD", {}),
    "SGD momentum": ("SGD", {"momentum": 0.9}),
    "SGD Nesterov, weight decay": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD dampening, maximize": ("SGD", {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "SGD fused": ("SGD", {"fused": True, "weight_decay": 0.01}),
    "SGD fused, Nesterov": ("SGD", {"fused": True, "momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {"weight_decay": 0.01}),
    "Adam amsgrad": ("Adam", {"amsgrad": True}),
    "Adam maximize": ("Adam", {"maximize": True, "betas": (0.8, 0.95)}),
    "Adam fused": ("Adam", {"fused": True}),
    "Adam fused, amsgrad": ("Adam", {"fused": True, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {}),
    "AdamW amsgrad": ("AdamW", {"amsgrad": True}),
    "AdamW fused": ("AdamW", {"fused": True}),
    "AdamW fused, amsgrad, maximize": ("AdamW", {"fused": True, "amsgrad": True, "maximize": True}),
    "Adagrad": ("Adagrad", {}),
    "Adagrad with everything": ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
    "Adagrad fused": ("Adagrad", {"fused": True}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop centered": ("RMSprop", {"centered": True}),
    "RMSprop centered, momentum": ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop momentum": ("RMSprop", {"momentum": 0.9}),
    "Adamax": ("Adamax", {"weight_decay": 0.1}),
    "NAdam": ("NAdam", {}),
    "NAdam decoupled": ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": ("RAdam", {}),
    "RAdam decoupled": ("RAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "Adadelta": ("Adadelta", {"weight_decay": 0.1, "rho": 0.8}),
    "Rprop": ("Rprop", {"maximize": True}),
    "ASGD": ("ASGD", {"weight_decay": 0.1, "alpha": 0.5, "t0": 10}),
    **{f"{name} foreach": (name, {"foreach": True}) for name in optim.ELEMENTWISE},
    **{f"{name} lr tensor": (name, {"lr": torch.tensor(0.01)}) for name in optim.ELEMENTWISE},
    "AdamW lr of float64": ("AdamW", {"lr": torch.tensor([0.01], dtype=torch.float64)}),
    "Adam betas tensors": ("Adam", {"betas": (torch.tensor(0.8), torch.tensor(0.95))}),
    "NAdam betas one tensor": ("NAdam", {"betas": torch.tensor([0.8, 0.95])}),
    "Adamax betas list": ("Adamax", {"betas": [0.8, 0.95]}),
    "NAdam foreach, lr tensor": ("NAdam", {"foreach": True, "lr": torch.tensor(0.01)}),
    "AdamW of numpy": ("AdamW", {"lr": np.float32(0.01), "weight_decay": np.float32(0.1), "eps": np.float64(1e-7)}),
    "SGD of tensors": ("SGD", {"momentum": torch.tensor(0.9), "weight_decay": torch.tensor(0.01)}),
    "SGD lr an integer": ("SGD", {"lr": 1}),
}
#: The case of each class with the most going on, for real processes.
SERVED = (
    "SGD Nesterov, weight decay",
    "SGD fused",
    "Adam amsgrad",
    "Adam fused, amsgrad",
    "AdamW",
    "AdamW fused",
    "Adagrad with everything",
    "RMSprop centered, momentum",
    "Adamax",
    "NAdam decoupled",
    "RAdam decoupled",
    "Adadelta",
    "Rprop",
    "ASGD",
    "AdamW lr tensor",
    "NAdam foreach, lr tensor",
    "AdamW of numpy",
)


def gradients_of(step: int) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def start() -> Tensors:
    return gradients_of(1000)


def optimizer_of(name: str, hyper: Hyper, parameters: Tensors) -> torch.optim.Optimizer:
    """Over both groups; the second one's weight decay is its own."""
    own = {"weight_decay": 0.003} if "weight_decay" in hyper else {}
    groups = [{"params": [parameters[key] for key in GROUPS[0]]}, {"params": [parameters[key] for key in GROUPS[1]]}]
    groups[1].update(own)  # type: ignore[arg-type]
    return getattr(torch.optim, name)(groups, **copy.deepcopy({"lr": 0.01, **hyper}))  # type: ignore[no-any-return]


def like(old: Any, new: float) -> Any:
    """A new value of the kind of the old one; a tensor is changed in place, as some loops do."""
    if isinstance(old, torch.Tensor):
        return old.fill_(new)
    return type(old)(new) if isinstance(old, np.generic) else new


def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a user's script may change from step to step, different in each group."""
    for number, group in enumerate(optimizer.param_groups):
        sign = -1 if step == 10 and "lambd" not in group else 1  # torch refuses a negative lr at the start alone
        group["lr"] = like(group["lr"], sign * 0.01 * (1 + number) * (1 - step / 40))
        if step > 15 and group.get("weight_decay"):
            group["weight_decay"] = 0.02
        if step > 20 and group.get("momentum"):
            group["momentum"] = 0.8
        if step > 20 and "betas" in group:
            group["betas"] = [like(*pair) for pair in zip(group["betas"], (0.85, 0.99), strict=True)]


def leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def by_torch(name: str, hyper: Hyper) -> Tensors:
    parameters = leaves(start())
    optimizer = optimizer_of(name, hyper, parameters)
    for step in range(STEPS):
        schedule(optimizer, step)
        for key, gradient in gradients_of(step).items():
            parameters[key].grad = gradient
        optimizer.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}


def cut(tensors: Tensors, bucket: Bucket) -> torch.Tensor:
    return torch.cat([tensors[NAMES[p.tensor]].reshape(-1)[p.start : p.stop] for p in bucket.pieces])


def payload(values: torch.Tensor) -> memoryview:
    return memoryview(b"".join(codecs.codec("none").encode(values)))


def in_slices(name: str, hyper: Hyper, bucket_bytes: int, num_shards: int) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Each bucket of the plan after the last step, as the server's store makes it."""
    optimizer = optimizer_of(name, hyper, leaves(start()))  # never steps: its groups say what the script wants
    _, described = optim.describe(optimizer)
    groups = zip(GROUPS, described, strict=True)
    model = Model(name, tuple(Group(tuple(TensorSpec(key, SHAPES[key]) for key in keys), h) for keys, h in groups))
    buckets = plan(model, bucket_bytes, num_shards).buckets
    store, none = Store(model, buckets), codecs.codec("none")
    for bucket in buckets:
        store.load(bucket.index, none, payload(cut(start(), bucket)))
    for step in range(STEPS):
        schedule(optimizer, step)
        _, now = optim.describe(optimizer)
        gradients = gradients_of(step)
        for bucket in buckets:
            gradient = Gradient("w0", step, 1.0, none, payload(cut(gradients, bucket)))
            mean, _ = store.mean(bucket.index, [gradient])
            assert mean is not None
            store.step(bucket.index, mean, now[bucket.group])
    for bucket in buckets:
        yield bucket, torch.frombuffer(bytearray(b"".join(store.encode(bucket.index, none))), dtype=torch.float32)


@pytest.mark.parametrize(("bucket_bytes", "num_shards"), [(1024, 1), (1024, 3), (1 << 20, 1)])
@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_bits_of_the_whole_model(case: str, bucket_bytes: int, num_shards: int) -> None:
    expected = by_torch(*CASES[case])
    found = list(in_slices(*CASES[case], bucket_bytes, num_shards))
    assert len(found) >= (15 if bucket_bytes == 1024 else 2)
    for bucket, values in found:
        assert torch.equal(values.view(torch.int32), cut(expected, bucket).view(torch.int32)), bucket


def test_every_listed_optimizer_is_shown_here() -> None:
    assert {name for name, _ in CASES.values()} == set(optim.ELEMENTWISE)
    assert {CASES[case][0] for case in SERVED} == set(optim.ELEMENTWISE)


# ------------------------------------------------------------------ over real servers


class Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in start().items():
            self.register_parameter(name, torch.nn.Parameter(value))

    @property
    def tensors(self) -> Tensors:
        return dict(self.named_parameters())


@pytest.mark.parametrize("case", SERVED)
def test_three_servers_give_the_bits_of_torch_with_a_schedule_in_the_script(case: str) -> None:
    name, hyper = CASES[case]
    model = Whole()
    with (
        job(shards=3, bucket_size=0.001) as servers,
        torch_ps.ParameterServerOptimizer(optimizer_of(name, hyper, model.tensors), model, str(servers)) as optimizer,
    ):
        for step in range(STEPS):
            schedule(optimizer, step)
            for key, gradient in gradients_of(step).items():
                model.tensors[key].grad = gradient
            optimizer.step()
    for key, value in by_torch(name, hyper).items():
        assert torch.equal(model.tensors[key].detach().view(torch.int32), value.view(torch.int32)), key


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "LBFGS", "SparseAdam"])
def test_optimizers_that_need_whole_tensors_are_refused_by_name_with_the_list(name: str) -> None:
    with pytest.raises(torch_ps.ConfigError, match=rf"torch\.optim\.{name} .*these work: SGD, Adam, .*ASGD"):
        torch_ps.OptimizerSpec(name, lr=0.1)
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = getattr(torch.optim, name)([parameter])
    with pytest.raises(torch_ps.ConfigError, match="these work: SGD"):
        optim.describe(optimizer)


BAD: dict[str, tuple[str, Hyper, Callable[[Hyper], None], str]] = {
    "negative lr of ASGD": ("ASGD", {}, lambda g: g.update(lr=-0.1), "lr has to be in .* got -0.1"),
    "lr NaN": ("Adam", {}, lambda g: g.update(lr=float("nan")), "lr is nan"),
    "lr beyond fp32": ("SGD", {}, lambda g: g.update(lr=1e300), "lr is 1e[+]300"),
    "beta of 1": ("AdamW", {}, lambda g: g.update(betas=(1.0, 0.9)), "Invalid beta parameter at index 0"),
    "three betas": ("Adam", {}, lambda g: g.update(betas=(0.9, 0.9, 0.9)), "betas .* has to be 2 numbers"),
    "text": ("SGD", {}, lambda g: g.update(dampening="much"), "dampening is 'much'"),
    "amsgrad in the middle": ("Adam", {}, lambda g: g.update(amsgrad=True), "amsgrad is False in this job"),
    "momentum of RMSprop": ("RMSprop", {}, lambda g: g.update(momentum=0.9), "momentum cannot change from 0 to 0.9"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_torch_would_refuse_is_refused_before_anything_changes(case: str) -> None:
    name, hyper, spoil, sentence = BAD[case]
    model = Whole()
    with (
        job(shards=2, bucket_size=0.001) as servers,
        torch_ps.ParameterServerOptimizer(optimizer_of(name, hyper, model.tensors), model, str(servers)) as optimizer,
    ):

        def step(number: int) -> None:
            for key, gradient in gradients_of(number).items():
                model.tensors[key].grad = gradient
            optimizer.step()

        step(0)
        before = {key: value.detach().clone() for key, value in model.tensors.items()}
        good = dict(optimizer.param_groups[1])
        spoil(optimizer.param_groups[1])  # the second group: the first must not be sent either
        with pytest.raises(torch_ps.ConfigError, match=sentence):
            step(1)
        assert all(torch.equal(model.tensors[key], value) for key, value in before.items())
        assert [servers.status(shard).version for shard in (0, 1)] == [1, 1]
        optimizer.param_groups[1].update(good)
        step(1)
        assert optimizer.version == 2
    alone = leaves(start())
    torch_optimizer = optimizer_of(name, hyper, alone)
    for number in range(2):
        for key, gradient in gradients_of(number).items():
            alone[key].grad = gradient
        torch_optimizer.step()
    assert all(torch.equal(model.tensors[key], value) for key, value in alone.items())


def test_worker_whose_optimizer_keeps_other_state_is_refused_at_join() -> None:
    x = {"x": torch.zeros(3)}
    with (
        job(workers=2) as servers,
        torch_ps.Client(str(servers), name="w0") as first,
        torch_ps.Client(str(servers), name="w1") as second,
    ):
        first.init(x, torch_ps.OptimizerSpec("Adam"))
        with pytest.raises(torch_ps.ModelMismatch, match=r"worker 'w1' .*amsgrad is False in this job"):
            second.init(x, torch_ps.OptimizerSpec("Adam", amsgrad=True))
