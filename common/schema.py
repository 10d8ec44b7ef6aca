"""The model of a job: names, shapes and dtypes of its tensors, in the order of the flat parameter vector.

Both sides derive the bucket plan from the ``Model``, so the lead compares it tensor by tensor when a worker joins and
names the first difference.

Rules of this file
  1. No values: a ``Model`` of any size takes a few kilobytes.
  2. A model that came over the wire is checked here, once, before anything is built from it.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.errors import ConfigError, ModelMismatch, ProtocolError
from torch_ps.common.optimizer_spec import Hyper, hyper_from_proto, hyper_to_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.tensor_words import num_words

MAX_TENSORS = 100_000
MAX_NAME = 1000
MAX_ELEMENTS = 1 << 40
#: Most dimensions of one tensor, which is torch's own limit, and most parameter groups of one optimizer.
MAX_DIMENSIONS = 64
MAX_GROUPS = 10_000
#: dtypes that an fp32 master copy can stand for. Integers are exact up to 2**24.
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
#: dtypes of copied buffers, whose bytes are kept: every one that a checkpoint can be exported with.
COPIED_DTYPES = (*DTYPES, "complex64", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
#: Last parts of the names of buffers that are averaged over the workers: the statistics of normalisation layers.
AVERAGED = ("running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor.

    Attributes:
        name: name in the model.
        shape: number of elements of each dimension.
        dtype: torch's name of the dtype, such as ``"float32"``.
        copied: whether this is a buffer that is never averaged: the servers keep the bytes of one worker's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    copied: bool = False

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, *, copied: bool = False) -> Self:
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), copied)

    @classmethod
    def of_buffer(cls, name: str, tensor: torch.Tensor) -> Self:
        """A buffer of a module, which is averaged or copied, see ``is_averaged``."""
        averaged = is_averaged(name, str(tensor.dtype).removeprefix("torch."))
        return cls.of(name, tensor, copied=not averaged)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def places(self) -> int:
        """Number of fp32 values in the flat vector: one for each element, or the words of a copied buffer's bytes."""
        return num_words(self.numel, self.torch_dtype) if self.copied else self.numel

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def __str__(self) -> str:
        return f"{self.name!r} {list(self.shape)} {self.dtype}{' (copied)' if self.copied else ''}"


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share hyperparameters, as in ``torch.optim``'s ``param_groups``."""

    tensors: tuple[TensorSpec, ...]
    hyper: Hyper


@dataclass(frozen=True, slots=True)
class Model:
    """A model without its values, and its optimizer.

    Attributes:
        optimizer: class name in ``torch.optim``.
        groups: parameter groups, in order.
        buffers: tensors that are never optimized: averaged, such as BatchNorm statistics, or copied.
    """

    optimizer: str
    groups: tuple[Group, ...]
    buffers: tuple[TensorSpec, ...] = ()

    def tensors(self) -> Iterator[TensorSpec]:
        """All tensors in the order of the flat vector: those of the groups, then the buffers."""
        for group in self.groups:
            yield from group.tensors
        yield from self.buffers

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel for group in self.groups for tensor in group.tensors)


def is_averaged(name: str, dtype: str) -> bool:
    """Whether a buffer of a module is averaged over the workers: running mean or variance, in floating point.

    Batch and instance normalisation of torch have these, and layers that are made after them. Any other buffer is taken
    from one worker, for nothing is known of what it means: a mean of unit vectors is none, nor is one of indices.
    """
    return name.rpartition(".")[2] in AVERAGED and "float" in dtype and dtype in DTYPES


def with_copied_buffers(model: Model) -> Model:
    """``model``, all of whose buffers are averaged, with those copied that ``is_averaged`` does not name."""
    buffers = tuple(replace(each, copied=not is_averaged(each.name, each.dtype)) for each in model.buffers)
    return replace(model, buffers=buffers)


def check(model: Model) -> None:
    """Refuse a model that cannot be served.

    Raises:
        ConfigError: the model has no parameter, a name twice, a dtype without fp32 master copy, or exceeds a limit, or
            its optimizer cannot make a step with the hyperparameters of a group.
    """
    seen: set[str] = set()
    total = 0
    for tensor in model.tensors():
        if not tensor.name or len(tensor.name) > MAX_NAME:
            raise ConfigError(f"a tensor name has {len(tensor.name)} characters; 1 to {MAX_NAME} are allowed")
        if tensor.name in seen:
            raise ConfigError(f"two tensors are named {tensor.name!r}")
        if tensor.dtype not in (dtypes := COPIED_DTYPES if tensor.copied else DTYPES):
            raise ConfigError(f"tensor {tensor} has a dtype that cannot be served; these can: {', '.join(dtypes)}")
        if tensor.copied and tensor not in model.buffers:
            raise ConfigError(f"tensor {tensor} is a parameter; only buffers can be copied")
        if any(size < 0 for size in tensor.shape):
            raise ConfigError(f"tensor {tensor} has a negative size")
        seen.add(tensor.name)
        total += tensor.places
    if not model.num_parameters:
        raise ConfigError("the model has no trainable parameter")
    if len(seen) > MAX_TENSORS or total > MAX_ELEMENTS:
        raise ConfigError(
            f"the model has {len(seen)} tensors with {total} elements; the limits are {MAX_TENSORS} and 2**40"
        )
    optim.check_groups(model.optimizer, (group.hyper for group in model.groups))


def check_same(job: Model, worker: Model, name: str) -> None:
    """Compare a worker's model with the job's. Hyperparameters may differ: they travel with each push.

    Raises:
        ModelMismatch: a tensor differs, or the running optimizer cannot take a hyperparameter; names the worker, and
            the first difference with both values.
    """
    if job.optimizer != worker.optimizer:
        raise ModelMismatch(f"worker {name!r} brings the optimizer {worker.optimizer}; the job uses {job.optimizer}")
    pairs = [(job.groups[i].tensors, worker.groups[i].tensors) for i in range(min(len(job.groups), len(worker.groups)))]
    pairs.append((job.buffers, worker.buffers))
    for mine, theirs in pairs:
        for a, b in zip(mine, theirs, strict=False):
            if a != b:
                raise ModelMismatch(f"worker {name!r} has tensor {b} where the job has {a}")
        if len(mine) != len(theirs):
            longer, who = (mine, "the job") if len(mine) > len(theirs) else (theirs, f"worker {name!r}")
            hint = "; give all workers the same buffers=" if mine is job.buffers else ""
            raise ModelMismatch(f"only {who} has tensor {longer[min(len(mine), len(theirs))]} (worker: {name!r}){hint}")
    if len(job.groups) != len(worker.groups):
        raise ModelMismatch(f"worker {name!r} has {len(worker.groups)} parameter groups; the job has {len(job.groups)}")
    for own, other in zip(job.groups, worker.groups, strict=True):
        if own.hyper != other.hyper:
            try:
                optim.check_change(job.optimizer, own.hyper, {**own.hyper, **other.hyper})
            except ConfigError as error:
                raise ModelMismatch(f"worker {name!r} brings other hyperparameters: {error}") from None


def digest_of(model: Model) -> str:
    """SHA-256 of a model with its hyperparameters, hexadecimal: equal models have equal digests in every process."""
    return hashlib.sha256(to_proto(model).SerializeToString(deterministic=True)).hexdigest()


def to_proto(model: Model) -> pb.Model:
    return pb.Model(
        optimizer=model.optimizer,
        group=[
            pb.ParameterGroup(tensor=[_tensor(t) for t in group.tensors], hyper=hyper_to_proto(group.hyper))
            for group in model.groups
        ],
        buffer=[_tensor(t) for t in model.buffers],
    )


def from_proto(message: pb.Model) -> Model:
    """Read and check a model that came over the wire.

    Raises:
        ProtocolError: the model exceeds a limit of this file.
    """
    _check_sizes(message)
    model = Model(
        optimizer=message.optimizer,
        groups=tuple(Group(tuple(map(_spec, g.tensor)), hyper_from_proto(g.hyper)) for g in message.group),
        buffers=tuple(map(_spec, message.buffer)),
    )
    try:
        check(model)
    except ConfigError as error:
        raise ProtocolError(f"the model cannot be served: {error}") from error
    return model


def _check_sizes(message: pb.Model) -> None:
    """Check counts before anything is built: a few megabytes of message can make a hundred times that in objects."""
    tensors = sum(len(group.tensor) for group in message.group) + len(message.buffer)
    if tensors > MAX_TENSORS or len(message.group) > MAX_GROUPS or len(message.optimizer) > MAX_NAME:
        raise ProtocolError(
            f"the model cannot be served: it has {tensors} tensors in {len(message.group)} groups; the limits are "
            f"{MAX_TENSORS} and {MAX_GROUPS}"
        )
    for part in (*(group.tensor for group in message.group), message.buffer):
        for tensor in part:
            if len(tensor.shape) > MAX_DIMENSIONS:
                raise ProtocolError(
                    f"the model cannot be served: tensor {tensor.name[:MAX_NAME]!r} has {len(tensor.shape)} "
                    f"dimensions; the limit is {MAX_DIMENSIONS}"
                )


def _tensor(spec: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(name=spec.name, shape=spec.shape, dtype=spec.dtype, copied=spec.copied)


def _spec(message: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, tuple(message.shape), message.dtype, message.copied)
