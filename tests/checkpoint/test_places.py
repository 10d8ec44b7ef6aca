"""Where checkpoints go and what becomes of them: a full disk, an object store, one file for plain PyTorch."""

import json
import os
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import torch_ps
from tests.support.checkpoint_folder import SIZES, write_checkpoints
from tests.support.commands import SECONDS, run, serving
from tests.support.jobs import until
from tests.support.restart import Shards, shards
from tests.support.s3 import s3
from tests.support.training import Make, backward, conv, mlp, same, seeded
from torch_ps.common.errors import CheckpointError
from torch_ps.ps.checkpoint import manifest as manifests
from torch_ps.ps.checkpoint.repository import Checkpoints
from torch_ps.ps.checkpoint.resume import choose


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(servers: Shards | str, make: Make, version: int) -> torch.nn.Module:
    """A fresh worker trains to ``version``; its model."""
    model = seeded(make)
    with torch_ps.ParameterServerOptimizer(adam(model), model, str(servers), name="w0") as optimizer:
        while optimizer.version < version:
            backward(model, optimizer.version)
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_failures_and_times_are_counted_for_prometheus(tmp_path: Path) -> None:
    with serving("--checkpoint", str(tmp_path), "--checkpoint-every", "2") as (_, ready):
        told = json.loads(ready.read_text())
        train(told["servers"][0], mlp, 9)

        def page() -> str:
            with urllib.request.urlopen(f"http://{told['metrics'][0]}/metrics", timeout=SECONDS) as answer:
                return str(answer.read().decode())

        until(lambda: "ps_checkpoint_version 0.0" not in page(), "a checkpoint is good")
        assert "ps_checkpoint_failures_total 0.0" in page()
        assert "ps_checkpoint_copy_seconds_count" in page()


@pytest.mark.parametrize(("before", "after", "size"), [(2, 3, 4.0), (3, 1, 4.0), (1, 2, 0.001)])
def test_other_number_of_shards_or_size_of_buckets_gives_the_same_bits(
    before: int, after: int, size: float, tmp_path: Path
) -> None:
    with shards() as servers:
        undisturbed = train(servers, conv, 9)
    with shards(before, checkpoint=str(tmp_path)) as servers:
        train(servers, conv, 5)
    with shards(after, checkpoint=str(tmp_path), resume=True, bucket_size=size) as servers:
        assert "earlier workers have to join again" in servers.log
        model = train(servers, conv, 9)
        servers.stop()
        assert Checkpoints(str(tmp_path)).versions()[0] == 9
    assert same(model, undisturbed)


def test_exported_model_is_one_that_plain_torch_loads(tmp_path: Path) -> None:
    model = seeded(conv).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    with shards(2, bucket_size=0.001, checkpoint=str(tmp_path / "kept")) as servers, torch_ps.Client(str(servers)) as c:
        parameters = dict(model.named_parameters())
        c.init(
            {name: each.detach() for name, each in parameters.items()},
            torch_ps.OptimizerSpec("SGD", lr=0.1),
            buffers=dict(model.named_buffers()),
        )
        c.push({name: torch.ones_like(each) for name, each in model.state_dict().items()})
        snapshot = c.pull().params
    out = tmp_path / "model.safetensors"
    done = run("ps-export", str(tmp_path / "kept"), str(out))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{out}: version 1, {len(snapshot)} tensors\n"
    exported = load_file(out)
    fresh = seeded(conv, seed=5).to(torch.bfloat16)
    for module in fresh.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    fresh.load_state_dict(exported)
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == exported[name].dtype == snapshot[name].dtype
        assert torch.equal(tensor, snapshot[name]), name


def test_export_takes_the_version_that_it_is_told_and_says_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    write_checkpoints(folder, num_shards=1)
    last, before = Checkpoints(str(folder)).versions()
    out = tmp_path / "model.safetensors"
    assert run("ps-export", str(folder), str(out), "--version", str(before)).stdout.startswith(
        f"{out}: version {before},"
    )
    assert {name: tensor.numel() for name, tensor in load_file(out).items()} == SIZES
    out.unlink()
    damaged = folder / manifests.shard_name(last, 0, 1, "safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    refused = run("ps-export", str(folder), str(out))
    assert refused.exit_code == 1
    assert "shard-0-of-1.safetensors is truncated" in refused.stderr
    assert list(tmp_path.glob("model*")) == []
    nothing = run("ps-export", str(tmp_path / "none"), str(out))
    assert nothing.exit_code == 1
    assert "there is no checkpoint in" in nothing.stderr


@pytest.mark.tier("all")
def test_object_store_keeps_a_job_as_a_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3(tmp_path, "bucket") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        arguments = ("--workers", "1", "--shards", "2", "--listen", "127.0.0.1:0", "--checkpoint", "s3://bucket/job")
        with shards() as servers:
            undisturbed = train(servers, mlp, 12)
        with serving(*arguments, "--checkpoint-every", "2", "--keep", "2") as (process, ready):
            train(",".join(json.loads(ready.read_text())["servers"]), mlp, 7)
            assert process.end() == 0
        with serving(*arguments, "--resume") as (process, ready):
            model = train(",".join(json.loads(ready.read_text())["servers"]), mlp, 12)
            assert process.end() == 0
        assert same(model, undisturbed)
        out = tmp_path / "model.safetensors"
        done = run("ps-export", "s3://bucket/job", str(out))
        assert done.stdout.startswith(f"{out}: version 12,"), done.stderr
        assert all(torch.equal(tensor, load_file(out)[name]) for name, tensor in model.state_dict().items())
        refused = run("ps-serve", "--listen", "127.0.0.1:0", "--checkpoint", "s3://bucket/job")
        assert refused.exit_code == 2
        assert "s3://bucket/job holds checkpoints of a job, the newest of version 12" in refused.stderr
        kept = Checkpoints("s3://bucket/job")
        assert kept.versions()[0] == 12
        kept.storage.write(manifests.shard_name(12, 1, 2, "json"), [b"{}"])
        with pytest.raises(CheckpointError, match=r"shard-1-of-2\.json is truncated"):
            choose(kept, resume=True, previous=False)
        before = choose(kept, resume=True, previous=True)
        assert before is not None
        assert kept.versions()[0] == before.version
        assert kept.storage.read("v000000000012.refused/shard-1-of-2.json", 10) == b"{}"


def test_damaged_checkpoint_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    write_checkpoints(folder, num_shards=1)
    last, before = Checkpoints(str(folder)).versions()
    damaged = folder / manifests.shard_name(last, 0, 1, "safetensors")
    os.truncate(damaged, 100)
    with shards() as servers:
        servers.kill()
        said = servers.refused(checkpoint=str(folder), resume=True)
        assert f"the checkpoint of version {last} cannot be used: {damaged} is truncated" in said
        servers.start(checkpoint=str(folder), resume_previous=True)
        assert servers.status().version == before
