"""What travels from a primary to its standby, as frames: made here, on the bucket's lane or on the event loop.

    state   Tensor, Tensor, ..., Bucket     one bucket, as a checkpoint would keep it at this moment
    step    (Tensor "squares",) (Tensor "written",) Step   what the optimizer is stepped with, and the ledger after it
    others  Answer, Roster, Data, Norm      what else decides how a worker that comes back is answered

Rules of this file
  1. A frame is whole: whoever has it can take it up without the next one.
  2. Text in a frame is JSON of plain data, as in a checkpoint.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from torch_ps.common.optimizer_spec import Hyper, changed_values, hyper_to_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.ballots import configuration_from_proto, configuration_to_proto
from torch_ps.common.wire.frames import Buffer, pack
from torch_ps.ps.core.effects import Apply, UpdateKey
from torch_ps.ps.core.failover.seat import ConfigChange
from torch_ps.ps.engine.parameter_store import Mean
from torch_ps.ps.engine.written_weights import Values

#: Name of the tensor of what is written before a step.
WRITTEN = "written"


def of_state(bucket: int, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> list[bytes]:
    """One bucket's whole state; ``tensors`` as in ``torch_ps.ps.engine.shard_state``, on the CPU."""
    frames = [of_tensor(bucket, name, tensor) for name, tensor in tensors.items()]
    end = pb.ReplicaBucket(bucket=bucket, progress=text(progress))
    return [*frames, pack(pb.ReplicaHeader(bucket=end))]


def of_tensor(bucket: int, name: str, tensor: torch.Tensor) -> bytes:
    header = pb.ReplicaTensor(bucket=bucket, name=name, scalar=not tensor.dim())
    return pack(pb.ReplicaHeader(tensor=header), _payload(tensor))


def of_step(
    bucket: int,
    apply: Apply,
    mean: Mean | None,
    hyper: Hyper,
    job: Hyper,
    written: Iterable[int],
    *,
    late: int,
    nonfinite: int,
) -> bytes:
    """One ``Apply`` that has a ``progress``.

    Args:
        mean: Gradient of the step; None: the optimizer makes no step.
        job: hyperparameters of the bucket's group in the model.
        written: positions of the pieces that were written to before it, increasing; see ``of_written``.
        late, nonfinite: counted so far.
    """
    step = pb.ReplicaStep(
        bucket=bucket,
        progress=text(apply.progress or {}),
        idle=mean is None,
        lr_scale=apply.lr_scale,
        hyper=hyper_to_proto(changed_values(hyper, job)),
        late=late,
        nonfinite=nonfinite,
        staleness=[each.staleness for each in apply.contributions],
        absent=() if mean is None else mean.absent,
        written=written,
    )
    return pack(pb.ReplicaHeader(step=step), () if mean is None else _payload(mean.values))


def of_written(bucket: int, values: Values) -> bytes:
    """What is written to a bucket before its next step: the values of the pieces in the order of their positions."""
    header = pb.ReplicaTensor(bucket=bucket, name=WRITTEN)
    return pack(pb.ReplicaHeader(tensor=header), [values[position] for position in sorted(values)])


def of_answer(bucket: int, worker: str, codec: str, *, whole: bool) -> bytes:
    answer = pb.ReplicaAnswer(bucket=bucket, worker=worker, codec=codec, whole=whole)
    return pack(pb.ReplicaHeader(answer=answer))


def of_roster(membership: Mapping[str, Any]) -> bytes:
    return pack(pb.ReplicaHeader(roster=pb.ReplicaRoster(membership=text(membership))))


def of_data(data: Mapping[str, Any]) -> bytes:
    return pack(pb.ReplicaHeader(data=pb.ReplicaData(data=text(data))))


def of_norm(group: UpdateKey, square: float | None) -> bytes:
    worker, session, step = group
    return pack(pb.ReplicaHeader(norm=pb.ReplicaNorm(worker=worker, session=session, step=step, square=square)))


def of_change(change: ConfigChange) -> bytes:
    electors = [pb.Elector(worker=worker, session=session) for worker, session in sorted(change.electorate)]
    configuration = configuration_to_proto(change.configuration)
    return pack(pb.ReplicaHeader(change=pb.ReplicaChange(configuration=configuration, elector=electors)))


def change_of(message: pb.ReplicaChange, number: int) -> ConfigChange:
    """The inverse; the change does not say its number."""
    electorate = frozenset((each.worker, each.session) for each in message.elector)
    return ConfigChange(number, configuration_from_proto(message.configuration), electorate)


def text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def data_of(text: str, what: str) -> dict[str, Any]:
    """The inverse of ``text``.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def tensor_of(payload: memoryview, *, scalar: bool) -> torch.Tensor:
    """The inverse of the payload: a copy, shape (n,) or (), fp32.

    Raises:
        ValueError: it is not a whole number of values, or not one for a scalar.
    """
    if len(payload) % 4 or (scalar and len(payload) != 4):
        raise ValueError(f"{len(payload)} bytes are no fp32 values")
    values = torch.frombuffer(bytearray(payload), dtype=torch.float32) if len(payload) else torch.empty(0)
    return values.reshape(()) if scalar else values


def _payload(tensor: torch.Tensor) -> tuple[Buffer]:
    values = tensor.detach().to("cpu", torch.float32).reshape(-1)
    return (values.numpy().data.cast("B"),) if values.numel() else (b"",)
