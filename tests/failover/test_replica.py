"""What a standby has is what its primary has, bit for bit: parameters, optimizer state, ledger, samples."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.checkpoint.test_resume import adamw, sgd
from tests.support.jobs import SECONDS, until
from tests.support.replicated import Replicated, replicated
from tests.support.threads import at_once
from tests.support.training import Experts, backward, conv, mlp, seeded
from torch_ps.ps.checkpoint.manifest import ShardManifest
from torch_ps.ps.checkpoint.repository import Checkpoints

STEPS = 8

#: Options of the servers, model, optimizer, options of the workers.
CASES: dict[str, tuple[dict[str, Any], Any, Any, dict[str, Any]]] = {
    "sgd with momentum": ({}, mlp, sgd, {}),
    "adamw, fp16 pushes": ({}, mlp, adamw, {"compress": "fp16"}),
    "fused adamw": ({}, mlp, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), {}),
    "adamw, int8 pulls": ({}, mlp, adamw, {"compress_pull": "int8"}),
    "sgd, sign pulls, network": ({}, mlp, sgd, {"compress_pull": "sign", "plane": "network"}),
    "adamw, buffers": ({}, conv, adamw, {}),
    "adamw, experts without a gradient": ({}, Experts, adamw, {}),
    "async, experts without a gradient": ({"mode": "async", "delay_compensation": "adaptive"}, Experts, sgd, {}),
    "asgd": ({}, mlp, lambda model: torch.optim.ASGD(model.parameters(), t0=2), {}),
    "clipped": ({"clip_norm": 0.05}, mlp, sgd, {}),
    "async": ({"mode": "async"}, mlp, adamw, {}),
    "async, clipped": ({"mode": "async", "clip_norm": 0.05}, mlp, sgd, {}),
    "async, adaptive compensation": ({"mode": "async", "delay_compensation": "adaptive"}, mlp, sgd, {}),
    "async, inverse": ({"mode": "async", "staleness_lr": "inverse"}, mlp, sgd, {}),
    "ssp": ({"mode": "ssp", "slack": 1}, mlp, adamw, {}),
}


def same_state(one: Path, other: Path, version: int) -> list[str]:
    """What differs between two checkpoints of ``version``, in words; [] is nothing."""
    found = []
    pairs = [
        (checkpoints, checkpoints.read(version)) for checkpoints in (Checkpoints(str(one)), Checkpoints(str(other)))
    ]
    for left, right in zip(*(c.parts(m) for c, m in pairs), strict=True):
        if _records(left) != _records(right):
            found.append(f"records of shard {left.shard}: {left.records} and {right.records}")
        a, b = (c.load(m, part) for (c, m), part in zip(pairs, (left, right), strict=True))
        for index, state in a.buckets.items():
            tensors, others = state.tensors, b.buckets[index].tensors
            keys = {key for key in tensors if not key.startswith("copy/")}
            if keys != {key for key in others if not key.startswith("copy/")}:
                found.append(f"bucket {index} has {sorted(tensors)} and {sorted(others)}")
            found += [f"{index}/{key}" for key in sorted(keys) if not torch.equal(tensors[key], others[key])]
        if a.counters != b.counters:
            found.append(f"counters: {a.counters} and {b.counters}")
    return found


def _records(part: ShardManifest) -> list[dict[str, Any]]:
    """Without the floor of ssp: it follows from the ledger, and a record is made before it is raised."""
    return [{key: value for key, value in record.items() if key != "floor"} for record in part.records]


def train(
    servers: Replicated,
    model: nn.Module,
    rank: int,
    make: Any,
    at: threading.Event,
    go: threading.Event,
    steps: int,
    options: Any,
) -> None:
    """So many steps; then stay until ``go``."""
    with torch_ps.ParameterServerOptimizer(make(model), model, str(servers), name=f"w{rank}", **options) as optimizer:
        backward(model, 0, rank)
        servers.wait()
        for step in range(1, steps + 1):
            optimizer.step()
            optimizer.zero_grad()
            if step < steps:
                backward(model, step, rank)
        at.set()
        assert go.wait(SECONDS)


@pytest.mark.parametrize(("case", "num_shards"), [(case, 1 + number % 2) for number, case in enumerate(CASES)])
def test_standby_has_the_bits_of_its_primary(case: str, num_shards: int, tmp_path: Path) -> None:
    """All primaries are killed at rest; what the standbys keep then is what the primaries have kept at that version."""
    settings, make_model, make, options = CASES[case]
    steps = STEPS // 2 if settings.get("mode") in ("async", "ssp") else STEPS
    one, other = tmp_path / "primary", tmp_path / "standby"
    kept = {"checkpoint": str(one), "checkpoint_every": STEPS}
    with replicated(
        num_shards, workers=2, bucket_size=0.002, of_standbys={"checkpoint": str(other)}, **settings, **kept
    ) as servers:
        at, go = [threading.Event(), threading.Event()], threading.Event()

        def fault() -> None:
            assert all(event.wait(SECONDS) for event in at)
            until(
                lambda: servers.status(servers.primaries[0]).checkpoint.version == STEPS, "the primaries have kept all"
            )
            servers.kill(*range(num_shards))
            until(lambda: all(servers.role(each) == "alone" for each in servers.standbys), "the standbys serve")
            until(lambda: all(w.connected for w in servers.status(servers.standbys[0]).worker), "the workers are back")
            servers.stop(*servers.standbys)
            go.set()

        models = [seeded(make_model) for _ in range(2)]
        at_once(
            *(lambda r=r, m=m: train(servers, m, r, make, at[r], go, steps, options) for r, m in enumerate(models)),
            fault,
        )
    assert same_state(one, other, STEPS) == []
