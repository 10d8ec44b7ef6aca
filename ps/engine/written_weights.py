"""Weights that training loops have written between two steps: set before the step of the push that brings them.

    push: positions of pieces, values --of_push()--> PushedWrites --lane: write()--> parameters --> optimizer step
                                                                        '--> record for the standby

Rules of this file
  1. A write counts whatever the gradient of its push: with weight 0, missing, or not finite, the values are set.
  2. Where several pushes of a step write to one piece, that of the lowest rank counts. Workers that have written other
     values than it are told once per shard.
  3. What a push has written is lost with the push if that comes too late, and the first such loss is told.
  4. What a worker with lossy pulls has of a bucket that was written to is forgotten, so that the next answer carries
     the written values themselves instead of an approximation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torch_ps.common.errors import CorruptFrame, ProtocolError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, Piece
from torch_ps.common.schema import Model
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.parameter_store import Store
from torch_ps.ps.transport.streams import Streams

#: Values by position of the piece in its bucket, fp32, as bytes.
Values = Mapping[int, memoryview]


@dataclass(frozen=True, slots=True)
class PushedWrites:
    """What the loop of one worker has written to one bucket.

    Attributes:
        worker, session, step: The push that brings it.
        positions: Positions of the pieces in the bucket, increasing.
        values: Their fp32 values, one piece after the other, checked.
    """

    worker: str
    session: int
    step: int
    positions: tuple[int, ...]
    values: memoryview

    def by_position(self, bucket: Bucket) -> dict[int, memoryview]:
        """The values of each piece."""
        return split(bucket, self.positions, self.values)


def of_push(bucket: Bucket, worker: str, session: int, push: pb.Push, payload: memoryview) -> PushedWrites | None:
    """What a push has written; None: nothing.

    Args:
        bucket: Bucket of the push.
        worker, session: Sender of the push.
        push: Header of the frame.
        payload: Payload of the frame.

    Raises:
        ProtocolError: The bucket holds buffers, or the push says of no other place where its gradient is.
        CorruptFrame: The positions are not those of pieces in increasing order, or the payload has another length.
    """
    if not push.written:
        return None
    positions = tuple(push.written)
    if bucket.rule != "optimizer":
        raise ProtocolError(f"worker {worker!r} writes weights to bucket {bucket.index}, which holds buffers")
    if not (push.missing or push.weight == 0 or push.HasField("ahead") or push.HasField("arena_bytes")):
        raise ProtocolError(
            f"worker {worker!r} sends written weights of bucket {bucket.index} in the place of its gradient; "
            "the gradient has to be sent ahead or to be in shared memory"
        )
    check_positions(bucket, positions)
    if len(payload) != 4 * (numel := sum(map(_numel, (bucket.pieces[each] for each in positions)))):
        raise CorruptFrame(f"{len(payload)} bytes of written weights for {numel} values of bucket {bucket.index}")
    return PushedWrites(worker, session, push.step, positions, payload)


def check_positions(bucket: Bucket, positions: Sequence[int]) -> None:
    """Refuse what are not positions of pieces of ``bucket``, in increasing order.

    Raises:
        CorruptFrame: The first position that is none, or not above the one before it.
    """
    before = -1
    for position in positions:
        if not before < position < len(bucket.pieces):
            raise CorruptFrame(
                f"position {position} after {before} in bucket {bucket.index} of {len(bucket.pieces)} pieces; "
                "positions grow and are below the number of pieces"
            )
        before = position


def split(bucket: Bucket, positions: Iterable[int], values: memoryview) -> dict[int, memoryview]:
    """The values of each piece, from those of all pieces one after the other."""
    found, at = dict[int, memoryview](), 0
    for position in positions:
        end = at + 4 * _numel(bucket.pieces[position])
        found[position] = values[at:end]
        at = end
    return found


def set_values(parameters: torch.Tensor, bucket: Bucket, values: Values) -> None:
    """Set pieces of the parameters of ``bucket``, fp32 of shape (numel,)."""
    for position, each in values.items():
        piece = bucket.pieces[position]
        parameters[piece.offset : piece.offset + _numel(piece)].copy_(_tensor(each))


class WeightWriter:
    """Writes to the parameters of one shard what the loops of workers have written.

    Args:
        store: Parameters of the shard.
        model: Model of the job.
        streams: Open streams, whose copies of the parameters are forgotten.
        compensator: Delay compensation; None: off.
        advise: Shows a warning; called on any thread.
    """

    def __init__(
        self,
        store: Store,
        model: Model,
        streams: Streams,
        compensator: Compensator | None,
        advise: Callable[[str], None],
    ) -> None:
        self._store, self._streams, self._compensator, self._advise = store, streams, compensator, advise
        self._names = [tensor.name for tensor in model.tensors()]
        self._told_difference = self._told_lost = False

    def write(self, bucket: Bucket, pushed: Sequence[PushedWrites]) -> Values:
        """Set what the pushes of one step have written, on the bucket's lane; returns it.

        Args:
            bucket: The bucket.
            pushed: The writes in rank order.
        """
        chosen: dict[int, memoryview] = {}
        for written in pushed:
            for position, values in written.by_position(bucket).items():
                if chosen.setdefault(position, values) != values and not self._told_difference:
                    self._told_difference = True
                    self._advise(self._difference(bucket, position, pushed, written))
        if not chosen:
            return chosen
        set_values(self._store.values(bucket.index), bucket, chosen)
        for stream in self._streams:
            stream.copies.forget(bucket.index)
        if self._compensator is not None:
            self._note(self._compensator, bucket, pushed)
        return chosen

    def tell_lost(self, bucket: Bucket, written: PushedWrites, reason: str) -> None:
        """Say once that what a push has written does not count, as the push itself does not."""
        if self._told_lost:
            return
        self._told_lost = True
        self._advise(
            f"what worker {written.worker!r} has written to tensor {self._name(bucket, written.positions[0])!r} is "
            f"lost with its push, which came too late: {reason}; write to weights where no push is left out, in mode "
            "sync without backup workers or in mode async without a bound on staleness"
        )

    def _note(self, compensator: Compensator, bucket: Bucket, pushed: Sequence[PushedWrites]) -> None:
        """Tell the compensator that these workers have computed their gradients from what they have written."""
        for written in pushed:
            for position, values in written.by_position(bucket).items():
                start = bucket.pieces[position].offset
                compensator.wrote(bucket.index, written.worker, written.session, start, _tensor(values))

    def _difference(self, bucket: Bucket, position: int, pushed: Sequence[PushedWrites], other: PushedWrites) -> str:
        first = next(each for each in pushed if position in each.positions)
        return (
            f"workers {first.worker!r} and {other.worker!r} have written different values to tensor "
            f"{self._name(bucket, position)!r} before step {other.step}: those of {first.worker!r}, which has the "
            "lower rank, count; have every worker write the same, or one worker alone"
        )

    def _name(self, bucket: Bucket, position: int) -> str:
        return self._names[bucket.pieces[position].tensor]


def _numel(piece: Piece) -> int:
    return piece.stop - piece.start


def _tensor(values: memoryview) -> torch.Tensor:
    return torch.frombuffer(values, dtype=torch.float32)
