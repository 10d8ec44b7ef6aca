"""Checkpoints of earlier versions of torch-ps, which averaged every buffer as fp32, load with their buffers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torch_ps
from tests.support.commands import run
from tests.support.restart import shards
from torch_ps.common import schema
from torch_ps.ps.checkpoint import manifest as manifests
from torch_ps.ps.checkpoint.repository import Checkpoints


class Buffered(nn.Module):
    """Buffers that were averaged and are copied now, in several buckets, beside one that still is averaged."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 8)
        for name, tensor in {
            "count": torch.tensor(7),
            "running_mean": torch.full((5,), 0.5),
            "queue": torch.arange(700.0) / 3,
            "index": torch.arange(301),
            "mask": torch.arange(9) % 2 == 0,
            "thirds": torch.arange(11, dtype=torch.float16) / 3,
        }.items():
            self.register_buffer(name, (tensor * value).to(tensor.dtype))


def optimizer_of(model: nn.Module, servers: object) -> torch_ps.ParameterServerOptimizer:
    return torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, str(servers))


def as_written_before(folder: Path) -> None:
    """Rewrite the manifest: its buffers have a name, a shape and a dtype."""
    checkpoints = Checkpoints(str(folder))
    (version,) = checkpoints.versions()
    name = manifests.commit_name(version)
    data = checkpoints.storage.read(name, 1 << 20)
    body = json.loads(manifests.body_of(data, "checkpoint", name))
    body["model"]["buffers"] = [each[:3] for each in body["model"]["buffers"]]
    checkpoints.storage.write(name, [manifests._dump("checkpoint", body)])


@pytest.mark.parametrize("num_shards", [1, 2])
def test_buffers_that_were_averaged_are_copied_from_then_on_with_their_values(
    num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shards(1, bucket_size=0.001, checkpoint=str(tmp_path)) as servers:
        trained = Buffered(1)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(schema, "is_averaged", lambda name, dtype: True)
            with optimizer_of(trained, servers) as optimizer:
                trained.layer.weight.grad = torch.ones_like(trained.layer.weight)
                optimizer.step()
        servers.stop()
    as_written_before(tmp_path)
    run("ps-export", str(tmp_path), str(tmp_path / "model.safetensors"))
    expected = trained.state_dict()
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in expected.items())
    with shards(num_shards, bucket_size=0.001, checkpoint=str(tmp_path), resume=True) as servers:
        resumed = Buffered(0)
        with optimizer_of(resumed, servers) as optimizer:
            assert optimizer.version == 1
            found = resumed.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
