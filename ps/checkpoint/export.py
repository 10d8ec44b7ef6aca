"""ps-export: the model of a checkpoint as one file that plain PyTorch loads.

    ps-export CHECKPOINT OUT.safetensors      model.load_state_dict(safetensors.torch.load_file("OUT.safetensors"))

Every tensor under its own name, in its own shape and dtype, buffers too; the optimizer's state stays behind.

Memory: one shard of the checkpoint and the largest tensor.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.export_config import ExportConfig
from torch_ps.common.plan import Piece
from torch_ps.common.schema import TensorSpec
from torch_ps.common.tensor_words import from_words
from torch_ps.common.wire.frames import Buffer
from torch_ps.ps.checkpoint.manifest import Manifest
from torch_ps.ps.checkpoint.repository import Checkpoints, plan_of
from torch_ps.ps.checkpoint.tensor_file import bytes_of, header
from torch_ps.ps.engine.shard_state import ShardState


@click.command(cls=Command)
@options_of(ExportConfig)
@click.argument("checkpoint")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(export: ExportConfig, checkpoint: str, out: Path) -> None:
    r"""Write the model of a CHECKPOINT, a folder or URL as given to ps-serve, to the file OUT.

    \b
    ps-export runs/checkpoints model.safetensors
    ps-export s3://bucket/job model.safetensors --version 2000
    """
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"{out} would hold safetensors, whatever its name says: give a name that ends in .safetensors; for plain "
            "torch.load, load that file with safetensors.torch.load_file and torch.save what it returns"
        )
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out} exists and is no regular file; give another name")
    checkpoints = Checkpoints(checkpoint)
    checkpoints.storage.try_reading()
    versions = checkpoints.versions()
    if not versions:
        raise CheckpointError(f"there is no checkpoint in {checkpoint}")
    version = export.version or versions[0]
    if version not in versions:
        known = ", ".join(map(str, versions))
        raise CheckpointError(f"there is no checkpoint of version {version} in {checkpoint}; its versions are {known}")
    manifest = checkpoints.read(version)
    part = out.with_name(f"{out.name}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:
            for chunk in model_file(checkpoints, manifest):
                file.write(chunk)
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    count = sum(1 for _ in manifest.model.tensors())
    click.echo(f"{out}: version {version}, {count} tensors")


def model_file(checkpoints: Checkpoints, manifest: Manifest) -> Iterator[Buffer]:
    """The bytes of the file, in pieces.

    Raises:
        CheckpointError: the checkpoint is damaged; says how.
    """
    parts, plan = checkpoints.parts(manifest), plan_of(manifest)
    places: dict[int, list[tuple[int, int, Piece]]] = {}
    for bucket in plan.buckets:
        for piece in bucket.pieces:
            places.setdefault(piece.tensor, []).append((bucket.shard, bucket.index, piece))

    @functools.lru_cache(2 if manifest.num_shards < 3 else manifest.num_shards)
    def shard(index: int) -> ShardState:
        return checkpoints.load(manifest, parts[index])

    specs = list(enumerate(manifest.model.tensors()))
    specs.sort(key=lambda each: -each[1].torch_dtype.itemsize)  # every tensor begins on a multiple of its own size
    yield header(
        ((spec.name, spec.torch_dtype, spec.shape) for _, spec in specs),
        {"format": "pt", "torch-ps version": str(manifest.version)},
    )
    for number, spec in specs:
        flat = torch.empty(spec.places)
        for index, of, piece in places.get(number, ()):
            values = shard(index).buckets[of].tensors["values"]
            flat[piece.start : piece.stop] = values[piece.offset : piece.offset + piece.stop - piece.start]
        yield bytes_of(_as(flat, spec))


def _as(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """As a worker does it: a copied buffer has its bits, and the mean of integers is rounded."""
    dtype = spec.torch_dtype
    if spec.copied:
        return from_words(values, spec.shape, dtype)
    return values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)


if __name__ == "__main__":
    main()
