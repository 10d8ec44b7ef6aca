"""--resume: chooses the checkpoint that a job goes on from, and restores a shard from it.

    lead:    newest checkpoint --all of it read and checked--> its own part --> Job.restore
    others:  ask the lead which one it was -------------------> their own part --> Job.restore

Rules of this file
  1. The lead chooses, once, so that all shards go on from one version.
  2. A damaged checkpoint is an error that names it. The one before is used only with --resume-previous.
  3. Members and ledgers are taken over only where they still hold: the mode and the buckets are the same, and pushes
     are not both applied one by one and clipped, for then some norms were under way between shards.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from torch_ps.common import schema
from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.common.plan import plan
from torch_ps.ps.checkpoint.manifest import MALFORMED, Manifest
from torch_ps.ps.checkpoint.repository import Checkpoints, plan_of
from torch_ps.ps.checkpoint.reshard import reshard
from torch_ps.ps.engine.shard_state import BucketState, ShardState
from torch_ps.ps.job.job import Job

log = logging.getLogger("torch_ps.ps")


def choose(checkpoints: Checkpoints, *, resume: bool, previous: bool) -> Manifest | None:
    """Lead: the checkpoint to go on from; None begins anew. Removes newer files.

    Args:
        resume: Whether the job may go on from a checkpoint.
        previous: Whether an older checkpoint may replace a damaged one.

    Raises:
        ConfigError: There are checkpoints and the job is not to go on from them.
        CheckpointError: The newest is damaged; the message says how.
    """
    versions = checkpoints.versions()
    if versions and not resume:
        raise ConfigError(
            f"{checkpoints.storage.url} holds checkpoints of a job, the newest of version {versions[0]}; go on from it "
            "with --resume, or give another --checkpoint"
        )
    for version in versions:
        try:
            manifest = checkpoints.read(version)
            checkpoints.verify(manifest)
        except CheckpointError as error:
            if not previous:
                hint = "use the one before with --resume-previous" if len(versions) > 1 else "there is no other"
                raise CheckpointError(f"the checkpoint of version {version} cannot be used: {error}; {hint}") from None
            log.warning("skipping the checkpoint of version %d: %s", version, error)
            continue
        checkpoints.clear(version)
        return manifest
    if versions:
        raise CheckpointError(f"none of the {len(versions)} checkpoints in {checkpoints.storage.url} can be used")
    if resume:
        log.info("there is no checkpoint in %s yet: the job begins anew", checkpoints.storage.url)
    checkpoints.clear(0)
    return None


def restore(job: Job, checkpoints: Checkpoints, manifest: Manifest) -> None:
    """Restore ``job``, before its first call, from a checkpoint.

    Raises:
        CheckpointError: A part of it is damaged; the message says how.
    """
    parts = checkpoints.parts(manifest)
    old = plan_of(manifest)
    model = schema.with_copied_buffers(manifest.model) if manifest.averaged else manifest.model
    new = plan(model, job.settings.bucket_bytes, job.settings.num_shards)
    if old == new:
        state = checkpoints.load(manifest, parts[job.settings.index])
    else:

        @functools.lru_cache(1)
        def shard(index: int) -> ShardState:
            return checkpoints.load(manifest, parts[index])

        def read(bucket: int) -> BucketState:
            return shard(old.buckets[bucket].shard).buckets[bucket]

        order = sorted(old.buckets, key=lambda bucket: bucket.shard)  # so that each file is opened once
        copied = {index: each for index, each in enumerate(model.tensors()) if each.copied and manifest.averaged}
        state = reshard(order, new.of_shard(job.settings.index), manifest.version, read, copied)
    same = (
        old == new and str(job.settings.mode) == manifest.mode and not (job.settings.mode.stale and job.clipping.norm)
    )
    if not same:
        state = ShardState(state.version, {i: _forgotten(part) for i, part in state.buckets.items()}, state.counters)
    try:
        job.restore(model, state, _sections(manifest, same) if job.membership is not None else {})
    except MALFORMED as error:
        raise CheckpointError(
            f"the checkpoint of version {manifest.version} in {checkpoints.storage.url} does not fit: {error!r}"
        ) from None
    job.resumed_from = checkpoints.storage.url
    log.info(
        "shard %d goes on from version %d of %s%s",
        job.settings.index,
        manifest.version,
        checkpoints.storage.url,
        "" if same else "; earlier workers have to join again, as shards, buckets or mode differ",
    )


def _forgotten(part: BucketState) -> BucketState:
    return BucketState({**part.record, "ledger": {}}, part.tensors)


def _sections(manifest: Manifest, same: bool) -> Mapping[str, Mapping[str, Any]]:
    if same:
        return manifest.sections
    return {**manifest.sections, "roster": {**manifest.sections.get("roster", {}), "members": []}}
