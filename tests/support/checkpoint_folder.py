"""A folder of checkpoints that a real job has written, and a child process that dies while it writes one more."""

import os
import sys
from pathlib import Path

import torch

import torch_ps
from tests.support.jobs import until
from tests.support.restart import shards
from tests.support.threads import at_once
from torch_ps.ps.checkpoint.manifest import Manifest
from torch_ps.ps.checkpoint.repository import Checkpoints

#: fp32 elements of the two tensors of the model.
SIZES = {"first": 700, "second": 300}


def write_checkpoints(folder: Path, *, num_shards: int = 2, count: int = 2) -> None:
    """``count`` checkpoints, 4 steps apart or more, of two workers that train with Adam."""
    with shards(num_shards, workers=2, bucket_size=0.001, checkpoint=str(folder), checkpoint_every=4) as servers:
        with torch_ps.Client(str(servers), name="w0") as one, torch_ps.Client(str(servers), name="w1") as two:
            model = {name: torch.zeros(size) for name, size in SIZES.items()}
            for client in (one, two):
                client.init(model, torch_ps.OptimizerSpec("Adam", lr=0.01))

            def step() -> bool:
                gradient = {name: torch.randn(size) for name, size in SIZES.items()}
                at_once(*(lambda c=client: c.push(gradient) for client in (one, two)))
                return len(Checkpoints(str(folder)).versions()) == count

            until(step, f"{count} checkpoints")
        servers.kill()
        servers.processes.clear()


def copy_of(checkpoints: Checkpoints, manifest: Manifest, version: int) -> None:
    """Write the state of ``manifest`` once more, as of ``version``."""
    import dataclasses

    facts = []
    for part in checkpoints.parts(manifest):
        state = checkpoints.load(manifest, part)
        buckets = {
            index: dataclasses.replace(each, record={**each.record, "version": version})
            for index, each in state.buckets.items()
        }
        state = dataclasses.replace(state, version=version, buckets=buckets)
        facts.append(checkpoints.write(state, part.shard, part.num_shards))
    checkpoints.commit(dataclasses.replace(manifest, version=version, shards=tuple(facts)))
    checkpoints.retain(1)


def die_while_writing(folder: str, version: int, operation: int) -> None:
    """In a child process: as ``copy_of``, but it is gone before its ``operation``-th change of the file system."""
    checkpoints, left = Checkpoints(folder), operation
    manifest = checkpoints.read(checkpoints.versions()[0])

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if not writes and event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if str(folder) not in str(arguments[0]):
            return
        left -= 1
        if not left:
            os._exit(9)

    sys.addaudithook(count)
    copy_of(checkpoints, manifest, version)
