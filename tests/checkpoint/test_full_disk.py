"""A disk that is really full: a file system of one megabyte in memory, all of which another file takes."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.commands import run
from tests.support.jobs import until
from tests.support.restart import Shards, shards
from torch_ps.ps.checkpoint.repository import Checkpoints

#: Elements, of which each shard has half, and bytes of the disk: three checkpoints fit, and half of another one.
SIZE, DISK = 60_000, 900_000
#: Bytes that stay free: the part of one shard finds room there, and no whole checkpoint.
ROOM = 150_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "torch-ps-test", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all but ``ROOM`` bytes, whatever checkpoints are written meanwhile; the file that does."""
    taken = disk / "taken"
    with taken.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(file.tell() - ROOM, 0))
    return taken


def folders(servers: Shards, kept: Path) -> set[str]:
    """Of all versions, good or not, when a server has answered."""
    servers.status()
    return {path.name for path in kept.iterdir()}


def test_full_disk_costs_checkpoints_and_nothing_else_and_failed_ones_take_no_room(disk: Path) -> None:
    kept = disk / "kept"
    spec, gradient = torch_ps.OptimizerSpec("SGD", lr=1.0), {"x": torch.ones(SIZE)}
    with shards(2, checkpoint=str(kept), checkpoint_every=2, keep=2) as servers:
        with torch_ps.Client(str(servers), name="w0") as client:
            client.init({"x": torch.zeros(SIZE)}, spec)
            checkpoint = servers.status().checkpoint

            def pushed() -> bool:
                nonlocal checkpoint
                client.push(gradient)
                checkpoint = servers.status().checkpoint
                return True

            until(lambda: pushed() and checkpoint.version > 2, "two checkpoints are good")
            taken = fill(disk)
            until(lambda: pushed() and checkpoint.failures > 3, "checkpoints find no room")
            last = checkpoint.version
            assert "No space left on device" in checkpoint.error
            said = run("ps-status", "--servers", str(servers)).stdout
            assert f"last good checkpoint: version {last}" in said
            assert "failed, the last: shard" in said
            assert "OSError: [Errno 28] No space left on device; training goes on and the next one is" in servers.log
            errors = [line for line in servers.log.splitlines() if "error: no checkpoint of version" in line]
            assert any(f"(the last good one is of version {last})" in line for line in errors if "server 0/2" in line)
            # The part of another shard may have found room in a checkpoint that is not good.
            assert not any("good one" in line for line in errors if "server 1/2" in line)
            good = {"owner.json", *(f"v{version:012d}" for version in Checkpoints(str(kept)).versions())}
            until(lambda: folders(servers, kept) == good, "nothing of the failed ones is left")
            taken.unlink()
            until(lambda: pushed() and checkpoint.version > last, "there is room again")
            pushed()
        servers.kill()
        servers.start(resume=True)
        with torch_ps.Client(str(servers), name="w1") as client:
            client.init({"x": torch.zeros(SIZE)}, spec)
            snapshot = client.pull()
        assert snapshot.version > last
        assert torch.equal(snapshot.params["x"], torch.full((SIZE,), -float(snapshot.version)))
        servers.stop()
