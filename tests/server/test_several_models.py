"""ps-serve --models: servers for each model, and the optimizers of a process in turn."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support import commands
from tests.support.processes import Child
from tests.support.training import backward, mlp, same, seeded
from torch_ps.common.wire.job_servers import parse_jobs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Child, Path]]:
    """``$PS_SERVERS`` of two models, the process, and the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    options = ["--workers", "1", "--models", "gen,critic", "--mode", "async", "--checkpoint", str(folder)]
    options += ["--listen", "127.0.0.1:0"]
    with commands.serving(*options) as (process, ready):
        yield ",".join(json.loads(ready.read_text())["servers"]), process, folder


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_two_models_of_one_shape_train_as_without_servers(models: tuple[str, Child, Path]) -> None:
    servers, process, folder = models
    assert [job.name for job in parse_jobs(servers)] == ["gen", "critic"]
    plain = [seeded(mlp, seed) for seed in (1, 2)]
    wrapped = [seeded(mlp, seed) for seed in (1, 2)]
    alone = [sgd(model) for model in plain]
    with (
        torch_ps.ParameterServerOptimizer(sgd(wrapped[0]), wrapped[0], servers) as gen,
        torch_ps.ParameterServerOptimizer(sgd(wrapped[1]), wrapped[1], servers) as critic,
    ):
        assert (gen.job, critic.job) == ("gen", "critic")
        for step in range(6):
            for model, optimizer in zip([*plain, *wrapped], [*alone, gen, critic], strict=True):
                backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
        third = seeded(mlp, 3)
        with pytest.raises(torch_ps.ConfigError, match="ps-run --models 3"):
            torch_ps.ParameterServerOptimizer(sgd(third), third, servers)
        with pytest.raises(torch_ps.ConfigError, match="another model in job critic"):
            torch_ps.ParameterServerOptimizer(sgd(third), third, servers, job="critic")
        gen.close()
        with torch_ps.ParameterServerOptimizer(sgd(third), third, servers) as again:
            assert again.job == "gen"
    assert all(same(one, other) for one, other in zip(plain[1:], wrapped[1:], strict=True))
    assert "server critic: worker" in process.output
    with pytest.raises(torch_ps.ConfigError, match=r"2 jobs \(gen, critic\); name one of them by job"):
        torch_ps.Client(servers)
    with torch_ps.Client(servers, job="critic") as observer:
        assert observer.pull().version == 6
    shown = commands.run("ps-status", "--servers", servers, "--json")
    found = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(each["job"], each["shards"][0]["version"]) for each in found] == [("gen", 6), ("critic", 6)]
    assert "job critic, mode async" in commands.run("ps-status", "--servers", servers, "--job", "critic").stdout
    assert process.end() == 0
    assert {each.name for each in folder.iterdir()} == {"gen", "critic"}
    assert all(any(each.iterdir()) for each in folder.iterdir())


def test_a_second_model_on_the_servers_of_one_is_refused_at_once(tmp_path: Path) -> None:
    with commands.serving("--listen", "127.0.0.1:0", "--mode", "async") as (_, ready):
        (server,) = json.loads(ready.read_text())["servers"]
        one, other = seeded(mlp, 1), seeded(mlp, 2)
        with torch_ps.ParameterServerOptimizer(sgd(one), one, server):
            kept = [value.clone() for value in other.state_dict().values()]
            with pytest.raises(torch_ps.ConfigError, match="a job trains one model: give each model servers of its"):
                torch_ps.ParameterServerOptimizer(sgd(other), other, server)
            assert all(map(torch.equal, other.state_dict().values(), kept))
