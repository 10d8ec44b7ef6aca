"""--resume: which checkpoint a job goes on from, and how a shard becomes what it was.

    lead:    newest checkpoint --all of it read and checked--> its own part --> Job.restore
    others:  ask the lead which one it was -------------------> their own part --> Job.restore

Rules of this file
  1. The lead chooses, once, so all shards go on from one version.
  2. A damaged checkpoint is an error with its name. The one before is used only if that was allowed in so many words.
  3. Members and ledgers are taken over where nothing about them can have changed: same mode, same buckets, and no
     pushes that are applied one by one and clipped, for their norms were halfway between shards.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.common.plan import plan
from torch_ps.ps.checkpoint.manifest import MALFORMED, Manifest
from torch_ps.ps.checkpoint.repository import Checkpoints, plan_of
from torch_ps.ps.checkpoint.reshard import reshard
from torch_ps.ps.engine.state import BucketState, ShardState
from torch_ps.ps.job.job import Job

log = logging.getLogger("torch_ps.ps")


def choose(checkpoints: Checkpoints, *, resume: bool, previous: bool) -> Manifest | None:
    """Lead: the checkpoint to go on from, None to begin anew. Clears away what is newer.

    Args:
        previous: whether the one before may be used in the place of a damaged one.

    Raises:
        ConfigError: there are checkpoints and the job is not to go on from them.
        CheckpointError: the newest is damaged; says how.
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
            log.warning("the checkpoint of version %d is passed over: %s", version, error)
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
    """Bring ``job``, of which nothing has been asked yet, to a checkpoint.

    Raises:
        CheckpointError: a part of it is damaged; says how.
    """
    parts = checkpoints.parts(manifest)
    old = plan_of(manifest)
    new = plan(manifest.model, job.settings.bucket_bytes, job.settings.num_shards)
    if old == new:
        state = checkpoints.load(manifest, parts[job.settings.index])
    else:

        @functools.lru_cache(1)
        def shard(index: int) -> ShardState:
            return checkpoints.load(manifest, parts[index])

        def read(bucket: int) -> BucketState:
            return shard(old.buckets[bucket].shard).buckets[bucket]

        order = sorted(old.buckets, key=lambda bucket: bucket.shard)  # so that each file is opened once
        state = reshard(order, new.of_shard(job.settings.index), manifest.version, read)
    same = (
        old == new and str(job.settings.mode) == manifest.mode and not (job.settings.mode.stale and job.clipping.norm)
    )
    if not same:
        state = ShardState(state.version, {i: _forgotten(part) for i, part in state.buckets.items()}, state.counters)
    try:
        job.restore(manifest.model, state, _sections(manifest, same) if job.membership is not None else {})
    except MALFORMED as error:
        raise CheckpointError(
            f"the checkpoint of version {manifest.version} in {checkpoints.storage.url} does not fit: {error!r}"
        ) from None
    log.info(
        "shard %d goes on from version %d of %s%s",
        job.settings.index,
        manifest.version,
        checkpoints.storage.url,
        "" if same else "; workers of before have to join again, for shards, buckets or mode are not the same",
    )


def _forgotten(part: BucketState) -> BucketState:
    return BucketState({**part.record, "ledger": {}}, part.tensors)


def _sections(manifest: Manifest, same: bool) -> Mapping[str, Mapping[str, Any]]:
    if same:
        return manifest.sections
    return {**manifest.sections, "roster": {**manifest.sections.get("roster", {}), "members": []}}
