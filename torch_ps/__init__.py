"""torch-ps: a gRPC parameter server for PyTorch.

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    optimizer = torch_ps.ParameterServerOptimizer(optimizer, model, servers="host:50051")

The names below are the public API; everything else is inside and may change. They are loaded at first use, so that the
import is cheap and the server's core needs nothing but the standard library.

Source: PEP 562.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_ps.common.codecs import Codec, register_codec
    from torch_ps.common.errors import (
        ConfigError,
        CorruptFrame,
        ModelMismatch,
        NameTaken,
        NotInitialised,
        Overloaded,
        ProtocolError,
        PsError,
        Refused,
        Restarted,
        ServerStopped,
        StaleGradient,
        StepConflict,
        Unauthenticated,
        UnknownCodec,
        UnknownWorker,
        Unreachable,
        WaitTimeout,
    )
    from torch_ps.common.optimizer_spec import OptimizerSpec
    from torch_ps.common.security.tls import Tls
    from torch_ps.worker.client import Client, PushResult, Snapshot
    from torch_ps.worker.data import shard
    from torch_ps.worker.optim.optimizer import ParameterServerOptimizer
    from torch_ps.worker.runtime.device import device
    from torch_ps.worker.runtime.standalone_env import alone
    from torch_ps.worker.tasks import Task

    __version__: str

__all__ = [
    "Client",
    "Codec",
    "ConfigError",
    "CorruptFrame",
    "ModelMismatch",
    "NameTaken",
    "NotInitialised",
    "OptimizerSpec",
    "Overloaded",
    "ParameterServerOptimizer",
    "ProtocolError",
    "PsError",
    "PushResult",
    "Refused",
    "Restarted",
    "ServerStopped",
    "Snapshot",
    "StaleGradient",
    "StepConflict",
    "Task",
    "Tls",
    "Unauthenticated",
    "UnknownCodec",
    "UnknownWorker",
    "Unreachable",
    "WaitTimeout",
    "alone",
    "device",
    "register_codec",
    "shard",
]

_MODULES = {
    "Client": "worker.client",
    "Codec": "common.codecs",
    "OptimizerSpec": "common.optimizer_spec",
    "ParameterServerOptimizer": "worker.optim.optimizer",
    "PushResult": "worker.client",
    "Snapshot": "worker.client",
    "Task": "worker.tasks",
    "Tls": "common.security.tls",
    "alone": "worker.runtime.standalone_env",
    "device": "worker.runtime.device",
    "register_codec": "common.codecs",
    "shard": "worker.data",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("torch_ps.common.version").PACKAGE
    if name not in __all__:
        raise AttributeError(f"module 'torch_ps' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torch_ps.{_MODULES.get(name, 'common.errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
