"""Manifests of a checkpoint: two kinds of JSON documents, parsed and written.

    v000000000100/checkpoint.json           written last, by the lead: without it there is no checkpoint
                    | size and SHA-256 of
                  shard-0-of-2.json         one per shard
                    | size and SHA-256 of
                  shard-0-of-2.safetensors  its tensors

A document is one line {"format", "kind", "size", "sha256"} about the rest, then the rest.

Rules of this file
  1. Pure functions; no files, no tensors. Whatever the bytes are, the result is a document that was checked entirely,
     or ``CheckpointError`` with the name of the file and what is wrong.
  2. Nothing is built from a number before it was checked against the size of something that exists.

Source: https://github.com/opencontainers/image-spec/blob/main/manifest.md for the chain of digests.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch_ps.common import schema
from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.common.optimizer_spec import HyperValue
from torch_ps.common.plan import MIN_BUCKET_BYTES
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.typed_numbers import TypedNumber
from torch_ps.common.wire.frames import MAX_BUCKET_BYTES
from torch_ps.ps.checkpoint.storage import FileFact
from torch_ps.ps.core.ledger import Ledger

FORMAT = "torch-ps checkpoint 1"
#: Exceptions that malformed JSON can raise where it is parsed.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
#: Largest document that is read and its longest first line, in bytes.
MAX_DOCUMENT, MAX_LINE = 256 << 20, 1024
MAX_SHARDS = 1024
MAX_VERSION = 1 << 53  # JSON's whole numbers are exact below
_VERSION_NAME = re.compile(r"v([0-9]{12,16})")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """One shard's part. ``records`` are ``Ledger.as_dict`` of its buckets, in order."""

    version: int
    shard: int
    num_shards: int
    tensors: FileFact
    records: tuple[Mapping[str, Any], ...]
    counters: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint.

    Attributes:
        shards: Manifests of all shards, in order.
        created: Seconds since 1970.
        averaged: Whether it is of an earlier version of torch-ps, which averaged every buffer.
    """

    version: int
    mode: str
    bucket_bytes: int
    model: Model
    shards: tuple[FileFact, ...]
    sections: Mapping[str, Mapping[str, Any]]
    created: float
    averaged: bool = False

    @property
    def num_shards(self) -> int:
        return len(self.shards)


def folder_of(version: int) -> str:
    return f"v{version:012}"


def version_of(folder: str) -> int | None:
    """The version whose checkpoint a folder holds; None: it is something else."""
    match = _VERSION_NAME.fullmatch(folder)
    version = int(match[1]) if match else 0
    return version if version and folder_of(version) == folder else None


def commit_name(version: int) -> str:
    return f"{folder_of(version)}/checkpoint.json"


def shard_name(version: int, shard: int, num_shards: int, suffix: str) -> str:
    return f"{folder_of(version)}/shard-{shard}-of-{num_shards}.{suffix}"


# -------------------------------------------------------------- to bytes


def dump_shard(manifest: ShardManifest) -> bytes:
    return _dump("shard", dataclasses.asdict(manifest))


def dump(manifest: Manifest) -> bytes:
    model = manifest.model
    return _dump(
        "checkpoint",
        {
            "version": manifest.version,
            "mode": manifest.mode,
            "bucket_bytes": manifest.bucket_bytes,
            "model": {
                "optimizer": model.optimizer,
                "groups": [
                    {"tensors": [_spec_out(each) for each in group.tensors], "hyper": group.hyper}
                    for group in model.groups
                ],
                "buffers": [[*_spec_out(each), each.copied] for each in model.buffers],
            },
            "shards": [dataclasses.asdict(each) for each in manifest.shards],
            "sections": manifest.sections,
            "created": manifest.created,
        },
    )


def _dump(kind: str, body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, allow_nan=False, separators=(",", ":"), default=dataclasses.asdict).encode()
    line = {"format": FORMAT, "kind": kind, "size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    return json.dumps(line).encode() + b"\n" + text


def _spec_out(spec: TensorSpec) -> list[Any]:
    return [spec.name, list(spec.shape), spec.dtype]


# -------------------------------------------------------------- from bytes


def body_of(data: bytes, kind: str, name: str) -> bytes:
    """The body of a document, checked against the digest in its first line.

    Raises:
        CheckpointError: foreign, truncated or damaged.
    """
    line, newline, body = data.partition(b"\n")
    head = _json(line, name) if newline and len(line) <= MAX_LINE else None
    if not isinstance(head, dict) or not str(head.get("format")).startswith("torch-ps checkpoint "):
        raise CheckpointError(f"{name} is not of a checkpoint of torch-ps")
    if head["format"] != FORMAT:
        raise CheckpointError(f"{name} is a {head['format']!r}; this version of torch-ps reads {FORMAT!r}")
    if head.get("kind") != kind:
        raise CheckpointError(f"{name} holds a {head.get('kind')!r} in place of a {kind!r}")
    size = head.get("size")
    if len(body) != size:
        what = "is truncated" if isinstance(size, int) and len(body) < size else "is damaged"
        raise CheckpointError(f"{name} {what}: {len(body)} bytes follow its first line in place of {size}")
    if hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise CheckpointError(f"{name} is damaged: its SHA-256 is not the one in its first line")
    return body


def parse_shard(body: bytes, name: str) -> ShardManifest:
    """Read the body of a shard's manifest.

    Raises:
        CheckpointError: says what is wrong.
    """
    data = _object(_json(body, name), name)
    try:
        version, shard = _count(data["version"], MAX_VERSION), _count(data["shard"], MAX_SHARDS)
        num_shards = _count(data["num_shards"], MAX_SHARDS)
        tensors = _fact(data["tensors"])
        if not version or shard >= num_shards or tensors.name != shard_name(version, shard, num_shards, "safetensors"):
            raise ValueError(f"shard {shard} of {num_shards} at version {version} does not go with {tensors.name!r}")
        records = tuple(data["records"])
        for number, record in enumerate(records):
            progress = Ledger(number)
            progress.restore(record)
            if progress.version != version:
                raise ValueError(f"bucket {number} has version {progress.version} in place of {version}")
        counters = data["counters"]
        for key in ("late", "nonfinite"):
            _count(counters[key], MAX_VERSION)
        for staleness, count in counters["staleness"]:
            _count(staleness, MAX_VERSION), _count(count, MAX_VERSION)
    except MALFORMED as error:
        _refuse(name, error)
    return ShardManifest(
        version=version, shard=shard, num_shards=num_shards, tensors=tensors, records=records, counters=counters
    )


def parse(body: bytes, name: str) -> Manifest:
    """Read the body of a checkpoint's manifest.

    Raises:
        CheckpointError: says what is wrong.
    """
    data = _object(_json(body, name), name)
    try:
        version = _count(data["version"], MAX_VERSION)
        shards = tuple(_fact(each) for each in data["shards"])
        names = [shard_name(version, shard, len(shards), "json") for shard in range(len(shards))]
        if not version or not 1 <= len(shards) <= MAX_SHARDS or [each.name for each in shards] != names:
            raise ValueError(f"version {version} does not go with its shards")
        bucket_bytes = _count(data["bucket_bytes"], MAX_BUCKET_BYTES)
        if bucket_bytes < MIN_BUCKET_BYTES:
            raise ValueError(f"bucket_bytes is {bucket_bytes}")
        sections = {str(key): _object(each, name) for key, each in data["sections"].items()}
        manifest = Manifest(
            version=version,
            mode=str(data["mode"]),
            bucket_bytes=bucket_bytes,
            model=_model(data["model"]),
            shards=shards,
            sections=sections,
            created=float(data["created"]),
            averaged=any(len(each) == 3 for each in data["model"]["buffers"]),
        )
    except (*MALFORMED, ConfigError) as error:
        _refuse(name, error)
    return manifest


def _refuse(name: str, error: Exception) -> NoReturn:
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    raise CheckpointError(f"{name} is no manifest of torch-ps: {what[:300]}") from None


def _json(data: bytes, name: str) -> Any:
    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number")

    try:
        return json.loads(data, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be read: {str(error)[:200]}") from None


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is no manifest of torch-ps: an object is needed, not a {type(value).__name__}")
    return value


def _count(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"a whole number from 0 to {most} is needed; got {str(value)[:40]!r}")
    return value


def _fact(data: Mapping[str, Any]) -> FileFact:
    digest = data["sha256"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("a SHA-256 has 64 hexadecimal digits")
    return FileFact(str(data["name"]), _count(data["size"], 1 << 50), digest)


def _model(data: Mapping[str, Any]) -> Model:
    optimizer = data["optimizer"]
    groups = tuple(
        Group(tuple(map(_spec, group["tensors"])), {str(key): _hyper(value) for key, value in group["hyper"].items()})
        for group in data["groups"]
    )
    model = Model(optimizer, groups, tuple(map(_buffer, data["buffers"])))
    schema.check(model)
    return model


def _spec(data: Any) -> TensorSpec:
    name, shape, dtype = data
    if not isinstance(name, str) or not isinstance(dtype, str) or len(shape) > 64:
        raise ValueError(f"{str(data)[:80]} is no tensor")
    return TensorSpec(name, tuple(_count(size, schema.MAX_ELEMENTS) for size in shape), dtype)


def _buffer(data: Any) -> TensorSpec:
    """A buffer; one without a fourth value was averaged, see ``Manifest.averaged``."""
    spec = _spec(data[:3])
    (copied,) = data[3:] or (False,)
    if not isinstance(copied, bool):
        raise ValueError(f"{str(data)[:80]} is no buffer")
    return dataclasses.replace(spec, copied=copied)


def _hyper(value: Any) -> HyperValue:
    if isinstance(value, list):
        return tuple(_typed(each) if isinstance(each, dict) else float(each) for each in value)
    if isinstance(value, dict):
        return _typed(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{str(value)[:40]!r} is no hyperparameter")


def _typed(value: Mapping[str, Any]) -> TypedNumber:
    return TypedNumber(str(value["type"]), float(value["value"]))
