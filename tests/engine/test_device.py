"""Parameters and optimizer on a device: a server there does what one on the CPU does, in every mode and codec.

Where torch finds no GPU the CPU stands in for it: see ``tests.support.gpu``.
"""

from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support import commands
from tests.support.gpu import GPU, STAGED
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from tests.support.training import Experts, Make, MakeOptimizer, backward, conv, same, seeded
from torch_ps.common import codecs
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.engine.gpu_staging import Staging

STEPS = 6

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
}


def trained(
    job_options: dict[str, Any], name: str = "SGD", num_workers: int = 2, make: Make = conv, **options: Any
) -> nn.Module:
    """The model that all workers hold after synchronous steps with unequal weights."""
    models = [seeded(make) for _ in range(num_workers)]
    with job(workers=num_workers, bucket_size=0.001, shards=2, threads=2, **job_options) as servers:

        def run(rank: int) -> None:
            inner = OPTIMIZERS[name](models[rank])
            with torch_ps.ParameterServerOptimizer(
                inner, models[rank], str(servers), name=f"w{rank}", **options
            ) as optimizer:
                optimizer.weight = 1.0 + rank
                for step in range(STEPS):
                    backward(models[rank], step, rank)
                    optimizer.step()
                    optimizer.zero_grad()

        at_once(*(lambda rank=rank: run(rank) for rank in range(num_workers)))
    assert all(same(models[0], other) for other in models[1:])
    return models[0]


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("SGD", {}, {"plane": "memory"}),
        ("SGD", {}, {"plane": "network"}),
        ("Adam", {}, {"compress": "fp16", "compress_pull": "bf16"}),
        ("AdamW fused", {}, {"compress": "bf16", "compress_pull": "fp16", "plane": "network"}),
        ("SGD", {}, {"compress": "int8", "compress_pull": "int8"}),
        ("SGD", {}, {"compress": "topk:0.1", "compress_pull": "topk:0.3"}),
        ("Adam", {"clip_norm": 0.05}, {}),
        ("SGD", {"clip_norm": 0.05}, {"compress": "fp16", "plane": "network"}),
    ],
)
def test_staged_parameters_get_the_bits_of_others(name: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    assert same(trained({"program": STAGED, **settings}, name, **options), trained(settings, name, **options))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_staged_parameters_without_a_gradient_are_left_alone_as_others_are(name: str) -> None:
    assert same(trained({"program": STAGED}, name, make=Experts), trained({}, name, make=Experts))


@pytest.mark.parametrize("compress_pull", ["none", "fp16", "int8"])
@pytest.mark.parametrize("settings", [{}, {"delay_compensation": "constant"}, {"delay_compensation": "adaptive"}])
def test_stale_gradients_meet_the_same_parameters(settings: dict[str, Any], compress_pull: str) -> None:
    """Two workers in turn, so every gradient is one version old; the check for divergence looks on."""

    def run(servers: Servers) -> list[float]:
        with (
            torch_ps.Client(str(servers), name="w0", compress_pull=compress_pull) as first,
            torch_ps.Client(str(servers), name="w1", compress_pull=compress_pull) as second,
        ):
            for client in (first, second):
                client.init({"x": torch.linspace(-1, 1, 1000)}, torch_ps.OptimizerSpec("SGD", lr=0.25))
            held = [first.pull(), second.pull()]
            for step in range(40):
                client, snapshot = (first, second)[step % 2], held[step % 2]
                result = client.push({"x": snapshot.params["x"].clone()}, base=snapshot.version)
                held[step % 2] = torch_ps.Snapshot(result.params, result.version)
            assert "check for divergence has failed" not in servers.log
            return [float(value) for value in held[0].params["x"]]

    with job(mode="async", workers=2, **settings) as servers:
        expected = run(servers)
    with job(mode="async", workers=2, program=STAGED, **settings) as servers:
        assert "parameters on cpu:0" in servers.log
        assert run(servers) == expected


def test_a_gradient_that_is_not_finite_is_named_and_left_out() -> None:
    with job(workers=2, program=STAGED) as servers:

        def run(rank: int) -> torch.Tensor:
            with torch_ps.Client(str(servers), name=f"w{rank}") as client:
                client.init({"a": torch.zeros(4), "b": torch.zeros(4)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
                bad = torch.full((4,), torch.nan if rank else 1.0)
                return client.push({"a": torch.ones(4), "b": bad}).params["b"]

        first, second = at_once(lambda: run(0), lambda: run(1))
        assert first.tolist() == second.tolist() == [-1.0] * 4
        assert "gradient of worker w1, step 0 is not finite in tensor 'b': left out of the mean" in servers.log


@pytest.mark.parametrize("name", ["none", "fp16", "int8", "topk:0.5"])
def test_three_payloads_in_a_row_do_not_disturb_each_other(name: str) -> None:
    staging, codec = Staging(torch.device("cpu", 0), 300), codecs.codec(name)
    payloads = [memoryview(b"".join(codec.encode(torch.randn(300)))) for _ in range(3)]
    expected = [codec.decode(payload, torch.empty(300)).clone() for payload in payloads]
    scratch = [torch.empty(300) for _ in range(3)]
    found = staging.decode(codec, payloads[0], scratch[0])
    total = found.clone()
    for payload, into in zip(payloads[1:], scratch[1:], strict=True):
        total = torch.add(total, staging.decode(codec, payload, into))
    assert torch.equal(total, expected[0] + expected[1] + expected[2])


# -------------------------------------------------------------- which device


@pytest.mark.parametrize("arguments", [[], ["--shards", "2"]])
def test_a_gpu_that_is_not_there_is_a_usage_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = commands.run("ps-serve", "--device", "cuda", *arguments)
    assert found.exit_code == 2
    assert "device cuda: torch" in found.stderr
    assert "finds no GPU here; use --device cpu" in found.stderr
    assert "listens" not in found.stderr


@pytest.mark.parametrize("device", ["auto", "gpu", "cuda:", "cuda:x"])
def test_a_server_takes_a_device_by_name_only(device: str) -> None:
    with pytest.raises(ConfigError, match="device must be cpu, cuda or cuda:N; got"):
        ServerConfig(device=device)


# -------------------------------------------------------------- on a GPU


@GPU
@pytest.mark.parametrize("plane", ["memory", "network"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW fused"])
@pytest.mark.parametrize("compress", ["none", "fp16", "int8"])
def test_a_gpu_trains_as_the_cpu_does(name: str, compress: str, plane: str) -> None:
    options: dict[str, Any] = {"compress": compress, "compress_pull": compress, "plane": plane}
    found, expected = trained({"device": "cuda"}, name, **options), trained({}, name, **options)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@GPU
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_leaves_parameters_without_a_gradient_alone_as_the_cpu_does(name: str) -> None:
    found, expected = trained({"device": "cuda"}, name, make=Experts), trained({}, name, make=Experts)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
