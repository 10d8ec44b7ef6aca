"""Every elementwise optimizer of torch.optim gives, in slices on a server, the bits it gives on the whole model.

The slices are as awkward as they come: small buckets, tensors of odd sizes, several groups, one shard or three. The
reference is torch itself, in one process, on whole tensors.

Source: torch.optim; the default implementation against the default one, fused against fused.
"""

from collections.abc import Callable

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.sliced import CASES, Hyper, Sliced, Tensors, gradients_of, leaves, optimizer_of, schedule, start
from torch_ps.common import optimizer_spec as optim

STEPS = 30

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


def by_torch(name: str, hyper: Hyper) -> Tensors:
    parameters = leaves(start())
    optimizer = optimizer_of(name, hyper, parameters)
    for step in range(STEPS):
        schedule(optimizer, step)
        for key, gradient in gradients_of(step).items():
            parameters[key].grad = gradient
        optimizer.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}


@pytest.mark.parametrize(("bucket_bytes", "num_shards"), [(1024, 1), (1024, 3), (1 << 20, 1)])
@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_bits_of_the_whole_model(case: str, bucket_bytes: int, num_shards: int) -> None:
    expected = by_torch(*CASES[case])
    found = Sliced(*CASES[case], bucket_bytes, num_shards)
    assert len(found.buckets) >= (15 if bucket_bytes == 1024 else 2)
    for step in range(STEPS):
        found.step(step, [gradients_of(step)])
    assert found.differing(expected) == []


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
