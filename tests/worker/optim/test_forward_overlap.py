"""overlap="forward": the bits of the plain order whatever the loop does, and no wait for what is not used."""

import contextlib
import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.pairwise import pairwise
from tests.support.proxy import Proxy
from tests.support.threads import at_once, spawn
from tests.support.training import Make, MakeOptimizer, backward, batch, conv, mlp, same, seeded

STEPS = 8
PLANES = ("memory", "network")

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
}
sgd = OPTIMIZERS["momentum"]


class Mixed(nn.Module):
    """Tied weights, a module used twice, parameters used outside of their module's forward, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(12, 12), nn.Linear(12, 12)
        self.tied.weight = self.first.weight
        self.twice = nn.Linear(12, 12)
        self.borrowed = nn.Linear(12, 12)
        self.unused = nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)  # uses the weights of its child out_proj
        self.last = nn.Linear(12, 7)
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(12))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(torch.tanh(self.first(x)), self.borrowed.weight, self.borrowed.bias)
        x = self.twice(torch.tanh(self.twice(self.tied(x)))) * self.scale[0]
        x = x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        y: torch.Tensor = self.last(x)
        return y


class Recurrent(nn.Module):
    """Weights in lists; a weight that is computed from two others before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.last = parametrizations.weight_norm(nn.Linear(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.lstm(x.view(-1, 3, 4))[0][:, -1])
        return y


def channels_last() -> nn.Module:
    return conv().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


Run = Callable[[nn.Module, torch.optim.Optimizer], None]


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def wrapped(
    model: nn.Module, servers: Servers | str, make: MakeOptimizer = sgd, **options: Any
) -> Iterator[torch_ps.ParameterServerOptimizer]:
    with torch_ps.ParameterServerOptimizer(
        make(model), model, str(servers), **{"overlap": "forward", **options}
    ) as optimizer:
        yield optimizer


def check(make: Make, run: Run = loop, optimizer: MakeOptimizer = sgd, *, shards: int = 2, **options: Any) -> None:
    """One worker ends with the bits of the plain order, over the network, whether it overlaps or not."""
    plain, forward = seeded(make), seeded(make)
    for model, changed in ((plain, {"overlap": "off", "plane": "network"}), (forward, {})):
        with (
            job(bucket_size=0.001, shards=shards) as servers,
            wrapped(model, servers, optimizer, **{"name": "w0", **options, **changed}) as over,
        ):
            run(model, over)
    assert same(forward, plain)
    assert {type(tensor) for tensor in forward.state_dict(keep_vars=True).values()} <= {torch.Tensor, nn.Parameter}


@pytest.mark.parametrize(
    ("make", "name", "plane"), pairwise([mlp, conv, Mixed, Recurrent, channels_last], [*OPTIMIZERS], PLANES)
)
def test_one_worker_has_the_bits_of_the_plain_order(make: Make, name: str, plane: str) -> None:
    check(make, optimizer=OPTIMIZERS[name], plane=plane)


@pytest.mark.parametrize("plane", PLANES)
def test_gradients_that_are_kept_and_zeroed(plane: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    check(conv, run, plane=plane)


def between(model: nn.Module, step: int) -> float:
    """What loops do with a model between two steps; the model is changed, too."""
    found = 0.0
    if step == 1:
        model.eval()
        with torch.no_grad():
            found += model(batch(99)[0]).sum().item()
        model.train()
    if step == 2:
        found += sum(parameter.norm().item() for parameter in model.parameters())
    if step == 3:
        found += sum(each.double().sum().item() for each in copy.deepcopy(model).state_dict().values())
    if step == 4:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        found += sum(each.double().sum().item() for each in torch.load(file).values())
    if step == 5:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.1, 0.1)
    if step == 6:
        found += sum(float(parameter.data.numpy().sum()) for parameter in model.parameters())
        state = {name: value * 0.5 for name, value in model.state_dict().items() if value.is_floating_point()}
        model.load_state_dict(state, strict=False)
    return found


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("make", [Mixed, conv])
def test_whatever_a_loop_does_between_two_steps_sees_the_last_one(make: Make, plane: str) -> None:
    seen: list[list[float]] = []

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        seen.append([])
        average = torch.optim.swa_utils.AveragedModel(model)
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            if step < 5:  # what is clamped or loaded in the loop lasts until the next push only
                average.update_parameters(model)
            seen[-1].append(between(model, step))
        seen[-1] += [parameter.sum().item() for parameter in average.parameters()]

    check(make, run, plane=plane)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("planes", "shards", "name"),
    pairwise([("network", "network"), ("memory", "memory"), ("memory", "network")], [1, 3], [*OPTIMIZERS]),
)
def test_two_workers_have_the_bits_of_the_plain_order(planes: tuple[str, str], shards: int, name: str) -> None:
    def together(overlaps: tuple[str, str]) -> list[nn.Module]:
        models = [seeded(conv), seeded(conv)]  # before any starts: the seed is the process's
        with job(workers=2, bucket_size=0.001, shards=shards) as servers:

            def train(rank: int) -> None:
                options: dict[str, Any] = {"overlap": overlaps[rank], "plane": planes[rank], "name": f"w{rank}"}
                with wrapped(models[rank], servers, OPTIMIZERS[name], **options) as optimizer:
                    assert optimizer.world == 2
                    for step in range(STEPS):
                        backward(models[rank], step, worker=rank)
                        optimizer.step()
                        optimizer.zero_grad()

            at_once(*(lambda rank=rank: train(rank) for rank in range(2)))
        return models

    plain = together(("off", "off"))
    for overlaps in (("forward", "forward"), ("forward", "off")):
        for model in together(overlaps):
            assert same(model, plain[0])


def test_facts_are_those_of_the_completed_step() -> None:
    def facts(overlap: str) -> list[tuple[float, ...]]:
        model = seeded(conv)
        found: list[tuple[float, ...]] = []
        with (
            job(mode="async", bucket_size=0.001, shards=2) as servers,
            wrapped(model, servers, overlap=overlap) as over,
        ):
            for step in range(STEPS):
                over.weight = 1.0 + step
                backward(model, step)
                over.step()
                over.zero_grad()
                found.append((over.samples, over.version, over.staleness, over.pushed_bytes, over.pulled_bytes))
        return found

    assert facts("forward") == facts("off")


@pytest.mark.parametrize("compress", ["fp16", "int8", "topk:0.1"])
def test_codecs_have_the_bits_of_the_plain_order(compress: str) -> None:
    check(conv, compress=compress, compress_pull="none" if compress == "topk:0.1" else compress)


def test_accumulated_passes_and_closures_have_the_bits_of_the_plain_order() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(3 * STEPS):
            optimizer.zero_grad()
            optimizer.step(functools.partial(backward, model, step))  # type: ignore[arg-type]

    check(mlp, run, accumulate=3)


def test_an_error_of_the_users_in_forward_changes_nothing() -> None:
    fails = [False]

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if fails[0]:
                raise ValueError("of the user's")
            return x

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(STEPS):
            fails[0] = True
            with pytest.raises(ValueError, match="of the user's"):
                backward(model, step)
            fails[0] = False
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    check(lambda: nn.Sequential(nn.Linear(12, 33), Fails(), nn.Linear(33, 7)), run)


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself, where a graph breaks
def test_a_compiled_model_waits_too() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        for step in range(4):
            backward(compiled, step)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()

    check(Mixed, run)


def sides() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 7))


def by_layer(model: nn.Module) -> torch.optim.Optimizer:
    """A group per layer, so that no bucket has tensors of two."""
    return torch.optim.SGD([{"params": list(layer.parameters())} for layer in model.children()][::2], lr=0.1)


@contextlib.contextmanager
def held_back(model: nn.Module, **options: Any) -> Iterator[tuple[torch_ps.ParameterServerOptimizer, Proxy]]:
    """A step is sent; a proxy holds back what the shard of the last layer answers, not what that of the first does."""
    with (
        job(shards=2, lease=2.0) as servers,
        Proxy(servers.addresses[1]) as proxy,
        wrapped(model, f"{servers.addresses[0]},{proxy.address}", by_layer, **options) as optimizer,
    ):
        shards = [set[int](), set[int](), set[int](), set[int]()]
        for bucket in optimizer._session.plan.buckets:
            for piece in bucket.pieces:
                shards[piece.tensor].add(bucket.shard)
        assert shards == [{0}, {0}, {1}, {1}], "this model's layers are to be on a shard each"
        proxy.hold()
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        yield optimizer, proxy
        proxy.release()


def test_the_first_module_runs_before_the_last_bucket_is_answered() -> None:
    local, remote = seeded(sides), seeded(sides)
    optimizer = by_layer(local)
    backward(local, 0)
    optimizer.step()
    expected = local(batch(1)[0])
    ran = []
    with held_back(remote) as (over, proxy):

        def first(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            ran.append(over._session.waiting)  # while the last layer's parameters have not come
            proxy.release()

        remote[0].register_forward_hook(first)  # type: ignore[index]
        assert torch.equal(remote(batch(1)[0]), expected)
        assert ran == [True]
        assert not over._session.waiting


def test_a_timeout_in_forward_says_who_is_waited_for_and_the_next_try_goes_on_waiting() -> None:
    model, other = seeded(mlp), seeded(mlp)
    with (
        job(workers=2) as servers,
        wrapped(model, servers, name="w0", timeout=0.3) as optimizer,
        wrapped(other, servers, name="w1", overlap="off") as late,
    ):
        backward(model, 0, worker=0)
        optimizer.step()
        for _ in range(2):
            with pytest.raises(torch_ps.WaitTimeout, match=r"worker 'w0' has waited 0\.3 s for step 0: .*w1"):
                model(batch(0)[0])
        with pytest.raises(torch_ps.WaitTimeout, match="w1"):
            optimizer.step()
        with pytest.raises(torch_ps.WaitTimeout, match="w1"):
            model[0].weight.sum()  # type: ignore[index]
        backward(other, 0, worker=1)
        late.step()
        assert torch.equal(model(batch(1)[0]), other(batch(1)[0]))
        assert optimizer.version == 1


def test_after_a_server_is_gone_the_error_is_told_once_and_the_model_can_be_used() -> None:
    model = seeded(sides)
    with held_back(model) as (optimizer, proxy):
        proxy.close()
        with pytest.raises(torch_ps.Unreachable):
            model(batch(0)[0])
        assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert optimizer.version == 0


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, but people have such models
def test_what_cannot_be_seen_is_refused() -> None:
    class Special(nn.Parameter):
        pass

    scripted = nn.Sequential(nn.Linear(3, 3), torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)))  # type: ignore[no-untyped-call]
    special = nn.Linear(3, 3)
    special.weight = Special(torch.ones(3, 3))
    for model, message in ((scripted, "TorchScript module '1'"), (special, "tensor 'weight', a Special, is used")):
        with (
            job() as servers,
            pytest.raises(torch_ps.ConfigError, match=f"overlap=forward cannot see when .*{message}"),
        ):
            torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers), overlap="forward")


def test_zero_grad_and_questions_of_shape_wait_for_nothing() -> None:
    model = seeded(sides)
    with held_back(model) as (optimizer, _):
        model.zero_grad()
        assert sum(parameter.numel() for parameter in model.parameters()) == 127
        assert next(tuple(parameter.shape) for parameter in model.parameters()) == (6, 12)
        assert optimizer._session.waiting


def test_parameters_may_be_read_on_any_thread() -> None:
    model = seeded(sides)
    with held_back(model) as (optimizer, proxy):
        reader = spawn(lambda: model[2].weight.detach().clone())  # type: ignore[index]
        assert optimizer._session.waiting
        proxy.release()
        found = reader.result(30)
    assert torch.equal(found, model[2].weight)  # type: ignore[index]
