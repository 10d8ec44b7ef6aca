"""The errors that torch-ps raises on purpose, as one tree.

    PsError
    +-- ConfigError            bad option or argument, raised before any socket opens
    +-- Unreachable            no server answers at an address; names the address and the reason
    +-- WaitTimeout            a wait reached its deadline; says who is waited for
    +-- Refused                the server listens but will not serve this worker (address, token, limits)
    |   +-- Overloaded         admission refused for now, safe to retry after a pause
    |   +-- Unauthenticated    the token is missing or wrong; says which of the two
    +-- NotServing             this server is a standby, or another one serves in its place; says which of the two
    +-- NoSharedMemory         this worker and this server cannot share memory; buckets travel over the network
    +-- ServerStopped          the server ended the job or is shutting down
    +-- CheckpointError        a checkpoint is damaged, incomplete or foreign; names the file and what is wrong with it
    +-- ProtocolError          the peer sent something the contract forbids
        +-- UnknownWorker      no live membership under this worker name and session
        +-- NameTaken          another live worker has this name or rank
        +-- NotInitialised     the job has no parameters yet; call init first
        +-- ModelMismatch      this worker's model differs from the job's; names the first difference
        +-- StepConflict       push for a step that is neither open nor already closed
        |   +-- Restarted      the servers were restarted from a checkpoint
        +-- StaleGradient      push computed from a version that is too old
        +-- CorruptFrame       a frame that cannot be decoded: truncated, oversized, wrong type
        +-- UnknownCodec       a codec name that is not in the registry

gRPC is not known here; ``torch_ps.common.rpc.status`` maps errors to its status codes. The receiver of an error
rebuilds it from its class name and its message, so every class takes one sentence.
"""


class PsError(Exception):
    """Base class of all errors below."""


class ConfigError(PsError):
    """A bad option or argument. Nothing has been opened or changed."""


class Unreachable(PsError):
    """No server answers at an address within the deadline."""


class WaitTimeout(PsError):
    """A wait reached its deadline; the message says who is being waited for."""


class Refused(PsError):
    """The server listens but will not serve this caller."""


class Overloaded(Refused):
    """The server is at one of its limits; retry after a pause."""


class Unauthenticated(Refused):
    """The token is missing or not the job's; the request was not read."""


class NotServing(PsError):
    """This server does not serve its shard now; another one does or will."""


class NoSharedMemory(PsError):
    """Two processes cannot share memory: another host, another user, or not the region that was offered."""


class ServerStopped(PsError):
    """The server has ended the job; a new server has to be started."""


class CheckpointError(PsError):
    """A checkpoint that cannot be used; the message names the file. Nothing has been changed."""


class ProtocolError(PsError):
    """The peer sent something the contract forbids."""


class UnknownWorker(ProtocolError):
    """No live membership under this worker name and session; join again."""


class NameTaken(ProtocolError):
    """Another live worker has this name or rank; choose another."""


class NotInitialised(ProtocolError):
    """The job has no parameters yet; one worker has to call ``init``."""


class ModelMismatch(ProtocolError):
    """This worker's model or optimizer is not the one the job trains."""


class StepConflict(ProtocolError):
    """A push for a step that is neither open nor already closed; pull, recompute, push again."""


class Restarted(StepConflict):
    """The servers were restarted since the caller joined; pull, recompute, push again once all of them are back."""


class StaleGradient(ProtocolError):
    """A gradient computed from a version that is too old; pull, recompute, push again."""


class CorruptFrame(ProtocolError):
    """A frame that cannot be decoded; it changed nothing."""


class UnknownCodec(ProtocolError):
    """A codec that is not in the registry; the message lists those that are."""


def _tree(root: type[PsError]) -> dict[str, type[PsError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


#: Class by name, to rebuild an error that crossed the wire.
BY_NAME: dict[str, type[PsError]] = _tree(PsError)
