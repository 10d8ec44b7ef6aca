"""Errors as gRPC statuses: a status code, the message, and the class name in a trailer.

Several classes share a code, so the receiver rebuilds the class from the ``ps-error`` trailer: user code sees
``StepConflict``, not a gRPC error. A class without a code is a bug and becomes INTERNAL.
"""

import re

import grpc

from torch_ps.common import errors

TRAILER = "ps-error"

#: Status code of each class; the comment says what the caller should do.
STATUS_OF: dict[type[errors.PsError], grpc.StatusCode] = {
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,  # never retry
    errors.WaitTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,  # the wait may be tried again
    errors.Refused: grpc.StatusCode.PERMISSION_DENIED,  # never retry
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry after a pause
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,  # never retry with this token
    errors.NotServing: grpc.StatusCode.UNAVAILABLE,  # ask the other server of the shard
    errors.ServerStopped: grpc.StatusCode.UNAVAILABLE,  # the job is over
    errors.ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,  # never retry
    errors.UnknownWorker: grpc.StatusCode.FAILED_PRECONDITION,  # join, then go on
    errors.NameTaken: grpc.StatusCode.ALREADY_EXISTS,  # take another name
    errors.NotInitialised: grpc.StatusCode.FAILED_PRECONDITION,  # init, then go on
    errors.ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,  # never retry
    errors.StepConflict: grpc.StatusCode.ABORTED,  # pull, recompute, push again
    errors.StaleGradient: grpc.StatusCode.ABORTED,  # the same
}


#: What gRPC's core says of a connection -> what a person is told; the first that is found counts.
_PLAIN: tuple[tuple[str, str], ...] = (
    (r"[Cc]onnection refused", "nothing listens there"),
    (r"[Cc]onnection reset|[Bb]roken pipe|[Ss]ocket closed|Stream removed|GOAWAY|EOF|shutdown", "the connection broke"),
    (r"not found|ARES_|resolving|DNS resolution|Name or service", "its name cannot be resolved"),
    (r"[Nn]o route to host|unreachable", "there is no route to it"),
    (r"ping timeout|watchdog|[Kk]eepalive", "it does not answer pings"),
    (r"CERTIFICATE_VERIFY_FAILED|[Hh]andshake|SSL_|TLS", "the TLS handshake fails"),
    (r"[Dd]eadline|[Tt]imed? ?out|[Tt]imeout", "it is silent"),
    (r"HTTP|http|SETTINGS", "it is no gRPC server"),
)
#: What gRPC says of a call that is one too many.
_OVER_LIMIT = "RPC limit"
#: Longest text of gRPC's that is passed on.
_MOST_TEXT = 200


def reason_of(failure: grpc.RpcError) -> str:
    """Why a call failed, without the address: the message of a server of ours, or what gRPC says in other words."""
    details = failure.details() or failure.code().name
    if TRAILER in _trailers(failure):
        return details
    found = next((words for pattern, words in _PLAIN if re.search(pattern, details)), "")
    return found or details.rpartition("last error: ")[2][:_MOST_TEXT]


def _trailers(failure: grpc.RpcError) -> dict[str, str | bytes]:
    return dict(failure.trailing_metadata() or ())  # type: ignore[arg-type]


def status_of(error: errors.PsError) -> grpc.StatusCode:
    """Nearest entry along the class's MRO; INTERNAL when nothing matches."""
    return next((STATUS_OF[c] for c in type(error).__mro__ if c in STATUS_OF), grpc.StatusCode.INTERNAL)


def trailers_of(error: errors.PsError) -> tuple[tuple[str, str], ...]:
    return ((TRAILER, type(error).__name__),)


def is_unread(failure: grpc.RpcError) -> bool:
    """Whether the server has ended a call before it looked at it, so that another try is worth its while.

    gRPC cancels calls that come while its queue of new ones is full; a server that ends cancels those that are open.
    """
    if TRAILER in _trailers(failure):
        return False
    limit = failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and _OVER_LIMIT in (failure.details() or "")
    return limit or failure.code() is grpc.StatusCode.CANCELLED


def error_of(failure: grpc.RpcError, address: str) -> errors.PsError:
    """Rebuild the error of a failed call from its trailer; without a trailer, choose a class by the status code.

    Args:
        failure: error that gRPC raised.
        address: address of the server, for the message.
    """
    code = failure.code()
    details = failure.details() or code.name
    known = errors.BY_NAME.get(str(_trailers(failure).get(TRAILER)))
    if known is errors.Unauthenticated:  # said before the server knows whom it speaks for
        return known(f"server {address}: {details}")
    if known is not None:
        return known(details)
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            # Without our trailer no server of ours has answered; gRPC reports a broken connection as any of the three.
            return errors.Unreachable(f"server {address} does not answer: {reason_of(failure)}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.WaitTimeout(f"server {address} did not answer in time")
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.Refused(f"{address} is a gRPC server but not one of torch-ps, or of another version")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if _OVER_LIMIT in details:
            return errors.Overloaded(f"server {address} has reached its limit of open calls; try again later")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.CorruptFrame(f"server {address} refused a message: {details}")
        case grpc.StatusCode.CANCELLED:  # see ``is_unread``; another server may serve
            return errors.Unreachable(
                f"server {address} has ended the call: more came than it reads, or it was stopped"
            )
        case _:
            return errors.PsError(f"server {address} failed with {code.name}: {details}; see its log")
