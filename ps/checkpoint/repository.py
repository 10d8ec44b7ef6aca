"""The checkpoints of one job below one URL: all shards write them, the lead commits them, anyone may read them.

    every shard: write() --> its tensors, then its manifest --report--> lead: commit() --> checkpoint.json, retain()

Rules of this file
  1. A checkpoint exists when its checkpoint.json does, which names the files of all shards by size and SHA-256. A crash
     before that leaves earlier checkpoints intact, and files that ``retain``, ``discard`` and ``clear`` remove.
  2. Everything that is read is checked before it is used: sizes, digests, and the shape and dtype of every tensor.

Source: the manifest as commit point follows log-structured stores, such as LevelDB's CURRENT file.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch

from torch_ps.common.errors import CheckpointError
from torch_ps.common.plan import Bucket, Plan, plan
from torch_ps.ps.checkpoint import manifest as manifests
from torch_ps.ps.checkpoint.manifest import MAX_DOCUMENT, Manifest, ShardManifest
from torch_ps.ps.checkpoint.storage import FileFact, Storage
from torch_ps.ps.checkpoint.tensor_file import TensorFile, chunks, in_order
from torch_ps.ps.engine.shard_state import BucketState, ShardState

log = logging.getLogger("torch_ps.ps")


class Checkpoints:
    """All checkpoints below ``url``, a folder or any URL that fsspec knows. All methods block."""

    def __init__(self, url: str) -> None:
        self.storage = Storage(url)

    # -------------------------------------------------------------- writing

    def write(self, state: ShardState, shard: int, num_shards: int) -> FileFact:
        """Write one shard's part. Returns name, size and digest of its manifest.

        Raises:
            OSError: The file system refuses.
        """

        def name(suffix: str) -> str:
            return manifests.shard_name(state.version, shard, num_shards, suffix)

        tensors = [(f"{index}/{key}", t) for index, part in state.buckets.items() for key, t in part.tensors.items()]
        written = self.storage.write(name("safetensors"), chunks(in_order(tensors)))
        document = ShardManifest(
            version=state.version,
            shard=shard,
            num_shards=num_shards,
            tensors=written,
            records=tuple(part.record for _, part in sorted(state.buckets.items())),
            counters=state.counters,
        )
        return self.storage.write(name("json"), [manifests.dump_shard(document)])

    def commit(self, manifest: Manifest) -> None:
        """Make the parts of all shards a checkpoint.

        Raises:
            CheckpointError: The lead cannot see a part.
            OSError: The file system refuses.
        """
        try:
            self.parts(manifest)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; all shards need the same --checkpoint, in a place that all of them see"
            ) from None
        self.storage.write(manifests.commit_name(manifest.version), [manifests.dump(manifest)])

    def retain(self, keep: int) -> None:
        """Remove all but the last ``keep`` checkpoints, and files of older versions that never became checkpoints."""
        good = self.versions()
        for version in self._folders():
            if good and version < good[0] and version not in good[:keep]:
                self._remove(version)

    def discard(self, version: int) -> None:
        """Remove uncommitted files up to ``version``: on a full disk the next checkpoint needs their room."""
        for each in self._folders():
            if each <= version and not self.storage.exists(manifests.commit_name(each)):
                self._remove(each)

    def clear(self, version: int) -> None:
        """Go on from ``version`` (0: begin anew): remove newer files, which would mix with those written from now on.

        A newer checkpoint, one that was refused, is renamed instead.
        """
        for each in self._folders():
            if each <= version:
                continue
            if self.storage.exists(manifests.commit_name(each)):
                folder = manifests.folder_of(each)
                log.warning("%s is put aside as %s.refused", self.storage.place(folder), folder)
                self.storage.rename(folder, f"{folder}.refused")
            else:
                self._remove(each)

    def _remove(self, version: int) -> None:
        self.storage.remove(manifests.commit_name(version))  # first: without it this is no checkpoint
        self.storage.remove(manifests.folder_of(version))

    def _folders(self) -> list[int]:
        """Versions of which there are files, newest first."""
        found = (manifests.version_of(folder) for folder in self.storage.folders())
        return sorted((version for version in found if version is not None), reverse=True)

    # -------------------------------------------------------------- reading

    def versions(self) -> list[int]:
        """Versions of all checkpoints, newest first."""
        return [each for each in self._folders() if self.storage.exists(manifests.commit_name(each))]

    def read(self, version: int) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        name = manifests.commit_name(version)
        data, place = self.storage.read(name, MAX_DOCUMENT), self.storage.place(name)
        manifest = manifests.parse(manifests.body_of(data, "checkpoint", place), place)
        if manifest.version != version:
            raise CheckpointError(f"{place} is of version {manifest.version}; somebody has moved it")
        return manifest

    def verify(self, manifest: Manifest) -> None:
        """Read every file once and compare it with the manifests.

        Raises:
            CheckpointError: A file differs; the message says which, and how.
        """
        for part in self.parts(manifest):
            self.storage.check(part.tensors, whole=True)

    def parts(self, manifest: Manifest) -> list[ShardManifest]:
        """The manifests of all shards.

        Raises:
            CheckpointError: A manifest is damaged, or the tensors cannot hold the model.
        """
        found = []
        for shard, fact in enumerate(manifest.shards):
            self.storage.check(fact, whole=True)
            place = self.storage.place(fact.name)
            body = manifests.body_of(self.storage.read(fact.name, MAX_DOCUMENT), "shard", place)
            part = manifests.parse_shard(body, place)
            if (part.version, part.shard, part.num_shards) != (manifest.version, shard, manifest.num_shards):
                raise CheckpointError(f"{place} is of shard {part.shard} of {part.num_shards}, version {part.version}")
            self.storage.check(part.tensors, whole=False)
            found.append(part)
        elements = sum(tensor.places for tensor in manifest.model.tensors())
        if sum(part.tensors.size for part in found) < 4 * elements:
            place = self.storage.place(manifests.commit_name(manifest.version))
            raise CheckpointError(f"{place} names a model of {elements} elements, for which its files are too small")
        return found

    def load(self, manifest: Manifest, part: ShardManifest) -> ShardState:
        """The state of one shard, as it was written.

        Raises:
            CheckpointError: A file is damaged, or a tensor does not fit the model.
        """
        buckets = plan_of(manifest).of_shard(part.shard)
        place = self.storage.place(part.tensors.name)
        if len(part.records) != len(buckets):
            raise CheckpointError(f"{place} has {len(part.records)} buckets; its shard of the model has {len(buckets)}")
        with self.storage.local(part.tensors) as path, TensorFile(path, place) as file:
            found: dict[int, dict[str, torch.Tensor]] = {bucket.index: {} for bucket in buckets}
            for bucket, key, name in _keys(file.keys, buckets, place):
                found[bucket.index][key] = _checked(file.get(name), bucket, key, place).clone()
        for bucket in buckets:
            if "values" not in found[bucket.index]:
                raise CheckpointError(f"{place} lacks the values of bucket {bucket.index}")
        pairs = zip(buckets, part.records, strict=True)
        return ShardState(
            manifest.version, {b.index: BucketState(record, found[b.index]) for b, record in pairs}, dict(part.counters)
        )


def plan_of(manifest: Manifest) -> Plan:
    """The bucket plan under which the checkpoint was written."""
    return plan(manifest.model, manifest.bucket_bytes, manifest.num_shards)


def _keys(names: Iterable[str], buckets: Sequence[Bucket], place: str) -> Iterator[tuple[Bucket, str, str]]:
    by_index = {str(bucket.index): bucket for bucket in buckets}
    for name in sorted(names):
        index, _, key = name.partition("/")
        if index not in by_index:
            raise CheckpointError(f"{place} has a tensor {name[:80]!r}, which is of no bucket of its shard")
        yield by_index[index], key, name


def _checked(tensor: torch.Tensor, bucket: Bucket, key: str, place: str) -> torch.Tensor:
    """``tensor``, if ``torch_ps.ps.engine.shard_state`` writes such a one under ``key``.

    Raises:
        CheckpointError: It does not.
    """
    kind, _, name = key.partition("/")
    shape = tuple(tensor.shape)
    named = {"values": False, "has_state": False, "squares": False, "state": True, "counter": True, "copy": True}
    if named.get(kind) != bool(name) or (bucket.rule != "optimizer" and kind != "values"):
        raise CheckpointError(f"{place} has a tensor {key[:80]!r} for bucket {bucket.index}, which knows none")
    if tensor.dtype != torch.float32 or not (shape == (bucket.numel,) or (kind == "state" and shape == ())):
        raise CheckpointError(
            f"{place}: tensor {key!r} of bucket {bucket.index} is {tensor.dtype} {list(shape)}; "
            f"torch.float32 [{bucket.numel}] is needed"
        )
    return tensor
