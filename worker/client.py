"""The low-level client: named tensors in, named tensors out, one method per call.

    with torch_ps.Client("host:50051", name="w0") as c:
        c.init({"x": torch.ones(1)}, torch_ps.OptimizerSpec("SGD", lr=0.25))
        snapshot = c.pull()
        result = c.push({"x": gradient(snapshot.params)}, base=snapshot.version)

For algorithms of one's own and for black-box checks. A training loop wants ``torch_ps.ParameterServerOptimizer``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from torch_ps.common import schema
from torch_ps.common.errors import ModelMismatch, NotInitialised
from torch_ps.common.optimizer_spec import OptimizerSpec, changed_values
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.security.tls import Tls
from torch_ps.worker.gradients.buffers import Buffers
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import FlatTensors, empty_fp32, gather
from torch_ps.worker.runtime.access import access, addresses_of, default_name
from torch_ps.worker.session.job_member import JobMember
from torch_ps.worker.session.session import Session


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters as pulled.

    Attributes:
        params: every tensor by name, in its own shape and dtype, on the CPU. Copies: yours to change.
        version: optimizer steps that every one of them has had; pass it as ``base`` with the gradient computed here.
    """

    params: dict[str, torch.Tensor]
    version: int


@dataclass(frozen=True, slots=True)
class PushResult:
    """What became of a push.

    Attributes:
        params: fresh parameters, like those of ``pull``.
        version: version of ``params``.
        staleness: version at apply - base, of the first bucket (buckets of crossing pushes may differ); 0 in sync mode.
        applied: False if the push came too late to count and was dropped.
        contributors: workers whose gradients made this version, in rank order.
        samples: sum of the weights that the job has absorbed so far.
    """

    params: dict[str, torch.Tensor]
    version: int
    staleness: int
    applied: bool
    contributors: tuple[str, ...]
    samples: float


class Client(JobMember):
    """One worker, or before ``init`` an observer that may only pull.

    Args:
        servers: "host:port" of every shard, comma-separated, shard 0 first; ``$PS_SERVERS`` if None.
        job: name of the job to talk to, where ``servers`` lists several; ``$PS_JOB`` if None.
        name: name of the worker, unique in the job; if None, w0, w1, ... by ``rank``, or made up if that is None, too.
        rank: place in sums and data splits; None for the order of names.
        compress: codec of gradients, such as "fp16" or "topk:0.01".
        compress_pull: codec of parameters.
        feedback: whether what a codec leaves out is added to the next push: "auto" for biased ones, "on", "off".
        compress_warmup: steps in which topk and randk send more than their density.
        plane: "auto" shares memory with servers on this host, "memory" insists on it, "network" does not and takes
            their data ports, or gRPC where these cannot be reached; "grpc" takes gRPC.
        connections: TCP connections to each data port, at most 16; more fill links with long round trips.
        tls: path of the authorities (PEM) that the servers' certificates have to be of, or a ``torch_ps.Tls`` that also
            has a certificate to show; ``$PS_TLS_CA``, ``$PS_TLS_CERT`` and ``$PS_TLS_KEY`` if None.
        token_file: path of the job's secret; ``$PS_TOKEN_FILE`` if None.
        insecure: whether the token may travel in the clear to other machines.
        timeout: seconds in which the servers have to be found, and that ``push`` and ``pull`` may wait for other
            workers.

    Raises:
        ConfigError: an argument is wrong.
        Unreachable: a server does not answer; names its address.
        Refused: TLS does not fit, or the token (``Unauthenticated``); says what.

    One client is for one thread at a time.
    """

    def __init__(
        self,
        servers: str | None = None,
        *,
        job: str | None = None,
        name: str | None = None,
        rank: int | None = None,
        compress: str = "none",
        compress_pull: str = "none",
        feedback: str = "auto",
        compress_warmup: int = 0,
        plane: str = "auto",
        connections: int = 1,
        tls: Tls | str | None = None,
        token_file: str | None = None,
        insecure: bool | None = None,
        timeout: float = 300.0,
    ) -> None:
        name = name or default_name(rank)
        self._rank = rank
        self._compressor = Compressor(compress, feedback=feedback, warmup=compress_warmup, worker=name)
        session = Session(
            addresses_of(servers, job),
            name,
            compressor=self._compressor,
            compress_pull=compress_pull,
            timeout=timeout,
            plane=plane,
            connections=connections,
            access=access(tls, token_file, insecure),
        )
        super().__init__(session)
        self._model: Model | None = None
        self._joined = False

    # -------------------------------------------------------------- verbs

    def init(
        self,
        params: Mapping[str, torch.Tensor],
        optimizer: OptimizerSpec,
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Become a worker of the job. One caller's values seed it; the others' names and shapes are compared.

        The seeder is the first caller or, in sync mode with ranks, the lowest rank of the first quorum.

        Args:
            params: every parameter, by name; the order has to be the same for all workers.
            optimizer: optimizer that the servers apply to averaged gradients.
            buffers: tensors that are averaged, not optimized, by name.

        Raises:
            ModelMismatch: the job trains other tensors; the first difference is named.
            NameTaken: another worker has this name or rank.
        """
        specs = tuple(TensorSpec.of(name, tensor) for name, tensor in params.items())
        more = tuple(TensorSpec.of(name, tensor) for name, tensor in (buffers or {}).items())
        model = Model(optimizer.name, (Group(specs, dict(optimizer.hyper)),), more)
        schema.check(model)
        self._prepare(model)
        source = FlatTensors([*params.values(), *(buffers or {}).values()])
        self._session.join(model, self._rank, lambda bucket: source.read(bucket, empty_fp32(bucket.numel)))
        self._changed = changed_values(optimizer.hyper, self._session.job_model.groups[0].hyper)
        self._joined = True

    def pull(self) -> Snapshot:
        """The job's parameters now (for a worker that has joined a running synchronous job: at its first step).

        Raises:
            NotInitialised: no worker has called ``init`` yet.
            WaitTimeout: says who is waited for.
        """
        if self._model is None:
            self._prepare(self._session.observe())
        self._session.discard_unanswered()
        for bucket in self._session.plan.buckets:
            self._session.pull(bucket)
        version = self._session.wait().version
        return Snapshot(self._params(), version)

    def push(
        self, gradients: Mapping[str, torch.Tensor], *, base: int | None = None, weight: float = 1.0
    ) -> PushResult:
        """Push gradients, and wait until the mode lets this worker go on.

        Args:
            gradients: one per parameter (and a new value per buffer), in its shape.
            base: version that the gradients were computed from; None for the last one that this client saw.
            weight: part of the gradients in the mean, usually the number of samples; 0, or 2^-53 to 2^53.

        Raises:
            NotInitialised: ``init`` was not called.
            ModelMismatch: a tensor is missing, unknown or has another shape; names it.
            StepConflict: in sync mode ``base`` is not the open step.
            WaitTimeout: says who is waited for.
        """
        if not self._joined or self._model is None:
            raise NotInitialised(f"worker {self.name!r} cannot push before it has called init")
        ordered = self._ordered(gradients)
        session = self._session
        session.discard_unanswered()
        step = session.next_step
        same = base is None or base == session.version
        for bucket in session.plan.buckets:
            with session.staging(bucket) as values:
                session.push(
                    bucket,
                    gather(bucket, ordered, values),
                    step=step,
                    base=session.version_of(bucket) if same else int(base or 0),
                    weight=weight,
                    hyper=self._changed if bucket.rule == "optimizer" else None,
                )
        outcome = session.wait()
        return PushResult(
            self._params(), outcome.version, outcome.staleness, outcome.applied, outcome.contributors, outcome.samples
        )

    def residual(self) -> dict[str, torch.Tensor]:
        """What error feedback keeps for the next push, by name; zeros where there is none.

        Raises:
            NotInitialised: ``init`` was not called.
        """
        if not self._joined:
            raise NotInitialised(f"worker {self.name!r} keeps nothing before it has called init")
        found = [empty_fp32(*spec.shape).zero_() for spec in self._specs]
        flat = FlatTensors(found)
        for bucket in self._session.plan.buckets:
            flat.write(bucket, self._compressor.residual(bucket))
        return {spec.name: tensor for spec, tensor in zip(self._specs, found, strict=True)}

    # -------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave the job; the others go on. Called when the client is dropped, and at exit."""
        self._lifetime.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------- inside

    def _prepare(self, model: Model) -> None:
        self._model = model
        self._specs = list(model.tensors())
        self._copy = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="cpu") for spec in self._specs]
        first = len(self._copy) - len(model.buffers)
        self._flat = FlatTensors(self._copy[:first], Buffers(model.buffers, self._copy[first:], first))
        self._session.on_values = self._flat.write

    def _params(self) -> dict[str, torch.Tensor]:
        return {spec.name: tensor.clone() for spec, tensor in zip(self._specs, self._copy, strict=True)}

    def _ordered(self, gradients: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
        unknown = set(gradients) - {spec.name for spec in self._specs}
        if unknown:
            raise ModelMismatch(f"there is no tensor {min(unknown)!r} in the model")
        ordered: list[torch.Tensor | None] = []
        for spec in self._specs:
            gradient = gradients.get(spec.name)
            if gradient is None:
                raise ModelMismatch(f"a gradient for tensor {spec} is missing")
            if tuple(gradient.shape) != spec.shape:
                raise ModelMismatch(f"the gradient for tensor {spec} has the shape {list(gradient.shape)}")
            ordered.append(gradient)
        return ordered
