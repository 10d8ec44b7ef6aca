"""What a checkpoint is on a disk: refused by name when it is not what was written, whole at every moment."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.checkpoint_folder import SIZES, copy_of, die_while_writing, write_checkpoints
from tests.support.processes import Child
from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.ps.checkpoint import manifest as manifests
from torch_ps.ps.checkpoint.repository import Checkpoints
from torch_ps.ps.checkpoint.resume import choose


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    write_checkpoints(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of two checkpoints of two shards."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def newest(folder: Path) -> Path:
    return folder / manifests.folder_of(Checkpoints(str(folder)).versions()[0])


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    path.write_text(json.dumps({"model_state_dict": {}}))


def future(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"torch-ps checkpoint 1", b"torch-ps checkpoint 9", 1))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("shard-1-of-2.safetensors", cut_off, "shard-1-of-2.safetensors is truncated: it has"),
    ("shard-1-of-2.safetensors", lengthen, "shard-1-of-2.safetensors is too long"),
    ("shard-0-of-2.safetensors", flip, "shard-0-of-2.safetensors is damaged: its SHA-256"),
    ("shard-0-of-2.safetensors", Path.unlink, "shard-0-of-2.safetensors is missing"),
    ("shard-1-of-2.json", cut_off, "shard-1-of-2.json is truncated"),
    ("shard-1-of-2.json", flip, "shard-1-of-2.json is damaged"),
    ("shard-1-of-2.json", foreign, "shard-1-of-2.json is truncated"),
    ("shard-1-of-2.json", Path.unlink, "shard-1-of-2.json is missing"),
    ("checkpoint.json", cut_off, "checkpoint.json is truncated"),
    ("checkpoint.json", flip, "checkpoint.json is damaged"),
    ("checkpoint.json", foreign, "checkpoint.json is not of a checkpoint of torch-ps"),
    ("checkpoint.json", future, "reads 'torch-ps checkpoint 1'"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE)
def test_damage_is_refused_by_name_and_the_one_before_is_used_only_if_that_is_allowed(
    name: str, damage: Callable[[Path], None], said: str, folder: Path
) -> None:
    checkpoints = Checkpoints(str(folder))
    last, before = checkpoints.versions()
    damage(newest(folder) / name)
    with pytest.raises(CheckpointError, match=said) as refused:
        choose(checkpoints, resume=True, previous=False)
    assert "--resume-previous" in str(refused.value)
    manifest = choose(checkpoints, resume=True, previous=True)
    assert manifest is not None
    assert manifest.version == before
    assert checkpoints.versions() == [before]
    assert (folder / f"{manifests.folder_of(last)}.refused" / "checkpoint.json").exists()


def test_checkpoint_of_another_version_or_job_in_its_place_is_refused(folder: Path) -> None:
    checkpoints = Checkpoints(str(folder))
    last, before = (folder / manifests.folder_of(version) for version in checkpoints.versions())
    shutil.copy(before / "checkpoint.json", last / "checkpoint.json")
    with pytest.raises(CheckpointError, match="somebody has moved it"):
        choose(checkpoints, resume=True, previous=False)


def test_tensors_that_are_not_those_of_the_model_are_refused(folder: Path) -> None:
    """Written by somebody who knows how to make the digests right."""
    checkpoints = Checkpoints(str(folder))
    manifest = checkpoints.read(checkpoints.versions()[0])
    part = checkpoints.parts(manifest)[0]
    path = str(folder / part.tensors.name)
    right = load_file(path)
    index = min(right).partition("/")[0]
    for key, tensor, said in (
        (f"{index}/values", torch.zeros(3), "is torch.float32 \\[3\\]"),
        (f"{index}/values", right[f"{index}/values"].double(), "is torch.float64"),
        ("9999/values", torch.zeros(1), "which is of no bucket of its shard"),
        (f"{index}/code", torch.zeros(1), "which knows none"),
    ):
        save_file({**right, key: tensor}, path)
        fact = checkpoints.storage.write(part.tensors.name, [Path(path).read_bytes()])
        forged = manifests.ShardManifest(
            version=part.version,
            shard=part.shard,
            num_shards=part.num_shards,
            tensors=fact,
            records=part.records,
            counters=part.counters,
        )
        with pytest.raises(CheckpointError, match=said):
            checkpoints.load(manifest, forged)


def test_job_that_is_not_to_go_on_from_them_does_not_start_among_old_checkpoints(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds checkpoints of a job"):
        choose(Checkpoints(str(folder)), resume=False, previous=False)


def test_empty_folder_is_a_new_job(tmp_path: Path) -> None:
    assert choose(Checkpoints(str(tmp_path / "none")), resume=True, previous=False) is None


def test_files_are_those_that_safetensors_reads(folder: Path) -> None:
    with safe_open(newest(folder) / "shard-0-of-2.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {name.partition("/")[2] for name in names} == {
        "values",
        "state/step",
        "state/exp_avg",
        "state/exp_avg_sq",
    }


def test_the_last_ones_are_kept_and_what_never_became_one_goes(folder: Path) -> None:
    checkpoints = Checkpoints(str(folder))
    last, _ = checkpoints.versions()
    manifest = checkpoints.read(last)
    (folder / manifests.folder_of(1)).mkdir()
    (folder / manifests.folder_of(last + 9)).mkdir()  # of shards that are writing now
    (folder / "notes").mkdir()
    copy_of(checkpoints, manifest, last + 4)
    assert checkpoints.versions() == [last + 4]
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes",
        "owner.json",
        manifests.folder_of(last + 4),
        manifests.folder_of(last + 9),
    ]


def test_death_at_any_moment_of_writing_leaves_a_good_checkpoint(folder: Path, tmp_path: Path) -> None:
    operations = 0
    while True:
        operations += 1
        place = Path(shutil.copytree(folder, tmp_path / f"death-{operations}"))
        before = Checkpoints(str(place)).versions()[0]
        arguments = (str(place), before + 4, operations)
        child = Child(f"{die_while_writing.__module__}:{die_while_writing.__name__}", arguments, tmp_path / "log")
        code = child.wait(60)
        assert code in (0, 9), child.output
        manifest = choose(Checkpoints(str(place)), resume=True, previous=False)
        assert manifest is not None
        assert manifest.version in (before, before + 4)
        left = [path.name for path in place.iterdir() if path.name > manifests.folder_of(manifest.version)]
        assert left == []
        shutil.rmtree(place)
        if code == 0:
            assert manifest.version == before + 4
            break
    assert operations > 12


def test_model_of_a_checkpoint_has_its_names_and_shapes(folder: Path) -> None:
    checkpoints = Checkpoints(str(folder))
    manifest = checkpoints.read(checkpoints.versions()[0])
    assert {tensor.name: tensor.numel for tensor in manifest.model.tensors()} == SIZES
