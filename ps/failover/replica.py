"""The standby's copy of a shard: applies the records of its primary, frame by frame.

    frame --take()--> checked --> lane of its bucket: the same optimizer step on the same bits
                              '-> ledger, roster, samples, norms: the newest is kept
    take_over() --> job: serves from here

Rules of this file
  1. The frames of one connection are taken in order; what has been taken is not lost while this process lives.
  2. At any moment the state is one in which the primary's core has been, except for pushes that were not applied: their
     workers send them again.
  3. What a worker with lossy pulls has is tracked one answer behind; see ``torch_ps.common.codecs.pulled_copies``.
"""

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torch_ps.common import codecs, schema
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import CorruptFrame
from torch_ps.common.optimizer_spec import Hyper, hyper_from_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.ps.core.dataset_register import merge_changes
from torch_ps.ps.core.effects import UpdateKey
from torch_ps.ps.core.ledger import drop_entries, merge_progress
from torch_ps.ps.core.roster import parse_roster
from torch_ps.ps.engine.bucket_jobs import Turn
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.grad_clip import REMEMBERED
from torch_ps.ps.engine.parameter_store import Mean
from torch_ps.ps.engine.shard_state import Tensors, restore_bucket
from torch_ps.ps.engine.written_weights import Values, check_positions, set_values, split
from torch_ps.ps.failover import records
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.lead_address import LeadAddress

#: Entries of sessions that have ended in the ledger of a bucket, beyond as many as there are members, until all go.
SPARE_ENTRIES = 16
#: Frames that may wait for their lanes; with more, nothing is read from the primary.
MOST_WAITING = 64


class Replica:
    """The state of ``job``'s shard as its primary has it. All methods run on the event loop.

    Args:
        lead: Where another shard than the lead finds it, which the primary's records say too; None on the lead.

    Attributes:
        complete: Every bucket has come.
    """

    def __init__(self, job: Job, lead: LeadAddress | None) -> None:
        self._job, self._lead = job, lead
        self.complete = False
        self._membership: dict[str, Any] = {}  # or, on another shard than the lead, the roster in the same form
        self._sessions: dict[str, int] = {}
        self._data: dict[str, Any] = {}
        self._progress: dict[int, dict[str, Any]] = {}  # by bucket
        self._tensors: dict[int, Tensors] = {}  # of a bucket that is not whole yet
        self._copies: dict[str, Copies] = {}  # by worker
        self._norms: OrderedDict[UpdateKey, float | None] = OrderedDict()
        self._engine: Engine | None = None
        self._buckets: dict[int, Bucket] = {}
        self._waiting = 0
        self._changed = asyncio.Event()

    # -------------------------------------------------------------- frames

    def take(self, header: pb.ReplicaHeader, payload: memoryview) -> None:
        """Take one frame.

        Raises:
            CorruptFrame: It is not what a primary sends here. It has changed nothing.
        """
        kind = header.WhichOneof("kind")
        try:
            match kind:
                case "model":
                    self._model(header.model)
                case "tensor":
                    self._tensor(header.tensor, payload)
                case "bucket":
                    self._bucket(header.bucket)
                case "step":
                    self._step(header.step, payload)
                case "answer":
                    self._answer(header.answer)
                case "roster":
                    self._roster(header.roster)
                case "data":
                    self._data = merge_changes(self._data, records.data_of(header.data.data, "data"))
                case "norm":
                    self._norm(header.norm)
                case "complete":
                    self._complete()
                case _:
                    raise ValueError("its kind is not known here")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFrame(f"a frame ({kind}) of the primary cannot be taken: {error!r}") from None

    def _model(self, message: pb.Model) -> None:
        engine = self._job.begin(schema.from_proto(message))
        self._engine, self._buckets = engine, {bucket.index: bucket for bucket in engine.buckets}

    def _tensor(self, header: pb.ReplicaTensor, payload: memoryview) -> None:
        bucket, tensor = self._of(header.bucket), records.tensor_of(payload, scalar=header.scalar)
        if not header.scalar and tensor.numel() != bucket.numel and header.name != records.WRITTEN:
            raise ValueError(
                f"tensor {header.name!r} has {tensor.numel()} values, bucket {bucket.index} {bucket.numel}"
            )
        self._tensors.setdefault(bucket.index, {})[header.name] = tensor

    def _bucket(self, header: pb.ReplicaBucket) -> None:
        bucket, engine = self._of(header.bucket), self._working()
        progress, tensors = records.data_of(header.progress, "progress"), self._tensors[bucket.index]
        version = int(progress["version"])
        if "values" not in tensors:
            raise ValueError(f"the values of bucket {bucket.index} are missing")
        del self._tensors[bucket.index]
        self._advance(bucket.index, progress)
        for name in [name for name in tensors if name.startswith("copy/")]:
            self._copies.setdefault(name.partition("/")[2], Copies()).lose(bucket.index, tensors.pop(name))
        self._turn(bucket, lambda: restore_bucket(engine, bucket, version, tensors))

    def _step(self, header: pb.ReplicaStep, payload: memoryview) -> None:
        bucket, engine = self._of(header.bucket), self._working()
        progress, before = records.data_of(header.progress, "progress"), self._progress[bucket.index]
        if int(progress["version"]) != int(before["version"]) + 1:
            raise ValueError(f"version {progress['version']} of bucket {bucket.index} follows {before['version']}")
        mean = None if header.idle else Mean(records.tensor_of(payload, scalar=False), tuple(header.absent))
        if mean is not None and mean.values.numel() != bucket.numel:
            raise ValueError(f"a gradient of {mean.values.numel()} values for bucket {bucket.index} of {bucket.numel}")
        if any(position >= len(bucket.pieces) for position in header.absent):
            raise ValueError(f"pieces {list(header.absent)} of bucket {bucket.index}, which has {len(bucket.pieces)}")
        job: Hyper = engine.model.groups[bucket.group].hyper if bucket.rule == "optimizer" else {}
        hyper = job | hyper_from_proto(header.hyper)
        tensors = self._tensors.pop(bucket.index, {})
        written = _written(bucket, tuple(header.written), tensors.get(records.WRITTEN))
        self._advance(bucket.index, merge_progress(before, progress))
        engine.late, engine.nonfinite = header.late, header.nonfinite
        engine.staleness.update(header.staleness)
        work = functools.partial(
            self._apply,
            engine,
            bucket,
            int(progress["version"]),
            mean,
            hyper,
            header.lr_scale,
            tensors.get("squares"),
            written,
        )
        self._turn(bucket, work)

    def _apply(
        self,
        engine: Engine,
        bucket: Bucket,
        version: int,
        mean: Mean | None,
        hyper: Hyper,
        lr_scale: float,
        squares: torch.Tensor | None,
        written: Values,
    ) -> None:
        """On the bucket's lane: the step that the primary has made."""
        store = engine.store
        for copies in tuple(self._copies.values()):
            if written:
                copies.forget(bucket.index)
            else:
                copies.settle(bucket.index, store.host(bucket.index))
        if squares is not None and engine.compensator is not None:
            engine.compensator.restore(bucket.index, squares.to(store.device))
        with engine.store.changing(bucket.index, version):
            set_values(store.values(bucket.index), bucket, written)
            if mean is not None:
                mean = replace(mean, values=mean.values.to(store.device))
                store.step(bucket.index, mean, hyper, lr_scale=lr_scale)

    def _answer(self, header: pb.ReplicaAnswer) -> None:
        bucket, codec = self._of(header.bucket), codecs.codec(header.codec)
        version = int(self._progress[bucket.index]["version"])
        if not codec.coarse:
            self._turn(bucket, functools.partial(self._note_pulled, bucket, header.worker, codec, version))
            return
        copies = self._copies.setdefault(header.worker, Copies())
        self._turn(bucket, functools.partial(_pend, copies, bucket.index, codec, version, header.whole))

    def _note_pulled(self, bucket: Bucket, worker: str, codec: Codec, version: int) -> None:
        """On the bucket's lane: what this worker decodes, as the primary has noted it."""
        engine = self._working()
        if engine.compensator is None or worker not in self._sessions:
            return
        store = engine.store
        values = store.values(bucket.index)
        if codec.name != "none":
            payload = memoryview(b"".join(store.encode(bucket.index, codec)))
            values = codec.decode(payload, torch.empty(bucket.numel)).to(store.device)
        engine.compensator.pulled(bucket.index, worker, self._sessions[worker], version, values)

    def _roster(self, header: pb.ReplicaRoster) -> None:
        told = records.data_of(header.membership, "roster")
        members = {str(member[0]) for member in told["members"]}
        roster = parse_roster(told)
        self._membership = told
        self._job.speakers.learn(roster.members)
        self._sessions = {str(member[0]): int(member[1]) for member in told["members"]}
        if self._engine is not None and self._engine.compensator is not None:
            self._engine.compensator.keep(roster)
        if self._lead is not None:
            self._lead.secret = bytes.fromhex(told["secret"])  # this server is that shard once it takes over
            self._lead.learn(str(each) for each in told["lead"])
        else:
            self._job.incarnation.learn({int(shard): list(map(str, digests)) for shard, digests in told["shards"]})
        self._copies = {worker: copies for worker, copies in self._copies.items() if worker in members}
        for bucket, progress in self._progress.items():
            if len(progress["ledger"]) > 2 * len(members) + SPARE_ENTRIES:
                self._progress[bucket] = drop_entries(progress, self._sessions)

    def _norm(self, header: pb.ReplicaNorm) -> None:
        group = header.worker, header.session, header.step
        self._norms[group] = header.square if header.HasField("square") else None
        while len(self._norms) > REMEMBERED:
            self._norms.popitem(last=False)

    def _complete(self) -> None:
        if missing := set(self._buckets) - set(self._progress):
            raise ValueError(f"{len(missing)} buckets have not come")
        self.complete = True

    # -------------------------------------------------------------- lanes

    def _turn(self, bucket: Bucket, work: Callable[[], object]) -> None:
        def run() -> list[bytes]:
            work()
            return []

        self._waiting += 1
        self._working().turn(bucket.index, Turn(run, self._turned))

    def _turned(self) -> None:
        self._waiting -= 1
        self._changed.set()

    async def room(self, most: int = MOST_WAITING) -> None:
        """Wait until at most ``most`` frames wait for their lanes."""
        while self._waiting > most:
            self._changed.clear()
            await self._changed.wait()

    # -------------------------------------------------------------- takeover

    async def take_over(self) -> None:
        """Have the job serve from this state.

        Raises:
            ValueError: There is no state, or it is not one that a primary can have had.
        """
        engine = self._working()
        await self.room(0)
        engine.core.restore([self._progress[bucket.index] for bucket in engine.buckets])
        for copies in self._copies.values():
            for index in copies.pending:
                engine.work.unsettled[index] = [*engine.work.unsettled.get(index, ()), copies]
        if self._job.clipping.norms is not None:
            self._job.clipping.norms.answers.update(self._norms)
        self._job.take_over(self._copies, self._membership, self._data)

    @property
    def version(self) -> int:
        """Number of steps that every bucket here has had."""
        return min((int(each["version"]) for each in self._progress.values()), default=0)

    def _advance(self, bucket: int, progress: dict[str, Any]) -> None:
        if "data" in progress:
            self._data = merge_changes(self._data, progress.pop("data"))
        self._progress[bucket] = progress

    def _of(self, index: int) -> Bucket:
        if index not in self._buckets:
            raise ValueError(f"bucket {index} is not one of this shard's {len(self._buckets)}")
        return self._buckets[index]

    def _working(self) -> Engine:
        if self._engine is None:
            raise ValueError("no model has come yet")
        return self._engine


def _pend(copies: Copies, bucket: int, codec: Codec, version: int, whole: bool) -> None:
    """On the bucket's lane. The seed is that of ``Store.encode_lacking``."""
    copies.pend(bucket, codec, (version << 32) + bucket, whole=whole)


def _written(bucket: Bucket, positions: tuple[int, ...], values: torch.Tensor | None) -> Values:
    """Values of the pieces that the primary has written to before a step.

    Raises:
        CorruptFrame: A position is not one of ``bucket``.
        ValueError: There are fewer or more values than the pieces have.
    """
    check_positions(bucket, positions)
    found = memoryview(b"") if values is None else values.numpy().data.cast("B")
    numel = sum(bucket.pieces[each].stop - bucket.pieces[each].start for each in positions)
    if len(found) != 4 * numel:
        raise ValueError(f"{len(found)} bytes of written weights for {numel} values of bucket {bucket.index}")
    return split(bucket, positions, found)
