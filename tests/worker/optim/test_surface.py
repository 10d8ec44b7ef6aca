"""What the wrapped optimizer refuses, its facts, the data split, and its end."""

import subprocess
import sys
from itertools import chain
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import torch_ps
from tests.support.commands import ROOT, environment
from tests.support.jobs import job
from tests.support.threads import at_once
from tests.support.training import backward, mlp, same, seeded


def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, **options: object) -> None:
    torch_ps.ParameterServerOptimizer(optimizer, model, "127.0.0.1:1", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "SparseAdam"])
def test_optimizer_that_is_not_elementwise_is_refused_with_those_that_work(name: str) -> None:
    model = mlp()
    with pytest.raises(torch_ps.ConfigError, match=rf"torch\.optim\.{name} cannot run on slices .*: SGD, Adam, AdamW"):
        wrap(getattr(torch.optim, name)(model.parameters()), model)


def test_graph_through_the_optimizer_is_refused() -> None:
    model = mlp()
    with pytest.raises(torch_ps.ConfigError, match=r"torch\.optim\.SGD: differentiable=True cannot be served"):
        wrap(torch.optim.SGD(model.parameters(), differentiable=True), model)


def test_optimizer_of_ones_own_is_refused_by_name() -> None:
    class Mine(torch.optim.SGD):
        pass

    model = mlp()
    with pytest.raises(torch_ps.ConfigError, match=r"test_surface\.Mine is not a class of torch\.optim"):
        wrap(Mine(model.parameters()), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be >= 1; got 0"),
        ({"outer_lr": 1.0}, "outer_lr=1 is for local steps and local_steps is 1"),
        ({"local_steps": 2, "overlap": "on"}, "overlap=on sends gradients during backward"),
        ({"compress": "zip"}, "codec 'zip' does not exist"),
        ({"compress_pull": "zip"}, "compress_pull: codec 'zip' does not exist"),
        ({"timeout": 0.0}, "timeout must be > 0 seconds"),
        ({"overlap": "maybe"}, "overlap must be one of auto, on, off, forward, eager, eager,forward; got 'maybe'"),
    ],
)
def test_bad_option_is_refused_before_any_connection(options: dict[str, object], message: str) -> None:
    model = mlp()
    with pytest.raises(torch_ps.ConfigError, match=message):
        wrap(torch.optim.SGD(model.parameters()), model, **options)


def test_parameter_outside_the_model_is_refused() -> None:
    with pytest.raises(torch_ps.ConfigError, match=r"a parameter of shape \[3\] that is not in the model"):
        wrap(torch.optim.SGD([nn.Parameter(torch.zeros(3))]), mlp())


def test_parameter_without_a_shape_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(torch_ps.ConfigError, match=r"'0\.weight' has no shape yet; run the model once"):
        wrap(torch.optim.SGD(model.parameters()), model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3, device="meta"), "parameter 'bad' is on the meta device and has no values; make them"),
        (torch.ones(1).expand(3), r"parameter 'bad' is expanded, .* make it of a clone\(\)"),
        (torch.eye(3).to_sparse(), "parameter 'bad' is sparse_coo; only dense parameters"),
        (torch.zeros(3, dtype=torch.complex64), r"tensor 'bad' \[3\] complex64 has a dtype that cannot be served"),
    ],
)
def test_parameter_that_cannot_be_trained_is_refused_by_name(values: torch.Tensor, message: str) -> None:
    model = mlp()
    model.register_parameter("bad", nn.Parameter(values))
    with pytest.raises(torch_ps.ConfigError, match=message):
        wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_servers_have_to_be_named() -> None:
    with pytest.raises(torch_ps.ConfigError, match="no servers: pass servers="):
        torch_ps.Client()


def test_address_that_nobody_listens_on_is_named_after_a_bounded_wait() -> None:
    with pytest.raises(torch_ps.Unreachable, match=r"at 127\.0\.0\.1:1 within 0.5 s: .*; check the address"):
        torch_ps.Client("127.0.0.1:1", timeout=0.5)


def test_host_that_does_not_exist_is_named_after_a_bounded_wait() -> None:
    with pytest.raises(torch_ps.Unreachable, match=r"no server answers at nowhere\.invalid:50051"):
        torch_ps.Client("nowhere.invalid:50051", timeout=0.5)


def test_list_of_servers_has_to_be_complete_and_in_order() -> None:
    with job(shards=2) as servers:
        for wrong in (servers.addresses[::-1], servers.addresses[:1]):
            with pytest.raises(torch_ps.ConfigError, match="list all shards of one job, shard 0 first"):
                torch_ps.Client(",".join(wrong))


@pytest.mark.parametrize(("size", "batch_size"), [(103, None), (103, 8)])
def test_static_shard_splits_disjointly_and_equally(size: int, batch_size: int | None) -> None:
    everyone = Barrier(3)
    with job(mode="async", workers=3) as servers:

        def mine(index: int) -> list[list[int]]:
            model = mlp()
            with torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters()), model, str(servers), name=f"w{index}"
            ) as optimizer:
                part = torch_ps.shard(
                    TensorDataset(torch.arange(size)), optimizer, batch_size=batch_size, epochs=2, split="static"
                )
                batches = [batch[0].flatten().tolist() for batch in part]
                assert len(part) == len(batches)
                assert batches == [batch[0].flatten().tolist() for batch in part]  # the same order again
                everyone.wait(60)  # who leaves earlier changes the ranks of the others
                return batches

        parts = at_once(*(lambda i=index: mine(i) for index in range(3)))
    for epoch in range(2):
        half = len(parts[0]) // 2
        seen = [sorted(chain(*part[epoch * half : (epoch + 1) * half])) for part in parts]
        assert len({len(each) for each in seen}) == 1
        together = [*chain(*seen)]
        assert len(set(together)) == len(together) > size - 3 * (batch_size or 1)
    assert parts[0][:half] != parts[0][half:]  # another order in the second epoch


def test_too_few_samples_for_the_workers_are_refused() -> None:
    model = mlp()
    with (
        job(mode="async") as servers,
        torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers)) as optimizer,
        pytest.raises(torch_ps.ConfigError, match="5 samples are too few for 1 workers with batches of 8"),
    ):
        torch_ps.shard(TensorDataset(torch.arange(5)), optimizer, batch_size=8, split="static")


def test_leased_data_has_no_length_and_a_schedule_goes_by_the_samples_of_the_job() -> None:
    """OneCycleLR and others that count steps ask for one; a wrong number would end an epoch early."""
    model = seeded(mlp)
    with (
        job(mode="async") as servers,
        torch_ps.ParameterServerOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, str(servers)
        ) as optimizer,
    ):
        data = torch_ps.shard(TensorDataset(torch.arange(12)), optimizer, batch_size=5, epochs=2)
        with pytest.raises(TypeError, match=r"no len\(\); a schedule or a line .* optimizer\.samples / 24, the part"):
            len(data)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - optimizer.samples / 24)
        rates = []
        for step, _ in enumerate(data):
            backward(model, step)
            optimizer.step()
            schedule.step()
            rates.append(round(24 * float(schedule.get_last_lr()[0])))
        assert (rates[-1], rates) == (0, sorted(rates, reverse=True))


def test_close_is_idempotent_and_the_model_keeps_its_parameters() -> None:
    model = seeded(mlp)
    with job() as servers:
        optimizer = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers))
        backward(model, 0)
        optimizer.step()
        before = seeded(mlp, 2)
        before.load_state_dict(model.state_dict())
        optimizer.close()
        optimizer.close()
        assert list(servers.status().worker) == []
        assert same(model, before)


SCRIPT = """
import torch, torch_ps
model = torch.nn.Linear(4, 4)
sgd = torch.optim.SGD(model.parameters())
optimizer = torch_ps.ParameterServerOptimizer(sgd, model, {servers!r}, name="script", plane="network")
for batch in torch.utils.data.DataLoader(torch.ones(8, 4), num_workers=2):  # forks, beside gRPC's threads
    model(batch).sum().backward()
    optimizer.step()
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise SystemExit(3)", 3)])
def test_script_that_does_not_close_ends_promptly_without_a_word_and_leaves_the_job(end: str, code: int) -> None:
    with job(lease=300) as servers:
        found = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT.format(servers=str(servers), end=end)],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (found.returncode, found.stdout, found.stderr) == (code, "", "")
        assert list(servers.status().worker) == []


FORKS = """
import os, sys, torch, torch_ps
model = torch.nn.Linear(4, 4)
optimizer = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, {servers!r}, name="w0")
samples = iter(torch_ps.shard(torch.utils.data.TensorDataset(torch.ones(8, 4)), optimizer, batch_size=2))
for number in range(3):
    model(*next(samples)).sum().backward()
    optimizer.step()
    if number == 1 and not (child := os.fork()):
        sys.exit(3)  # all that a Python program does at its end
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), optimizer.workers)
"""


def test_forked_child_ends_at_once_and_does_not_leave_in_the_name_of_its_parent() -> None:
    with job(lease=300) as servers:
        found = subprocess.run(
            [sys.executable, "-c", FORKS.format(servers=str(servers))],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (found.returncode, found.stdout, found.stderr) == (0, "3 ('w0',)\n", "")
