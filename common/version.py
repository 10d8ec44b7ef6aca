"""What this process runs, as peers tell each other, and whether two of them understand each other.

    Describe, Join, Hello, Enter, Replicate, Status --Version(package, wire)--> mismatch() --> a sentence, or ""

Rules of this file
  1. ``WIRE`` is the number of the contract in ``proto/``. Whoever changes the contract so that an older peer would
     misunderstand a newer one adds one to it.
  2. Peers of one wire number understand each other, whatever package they are of. Peers of different ones do not.
  3. A peer that sends no version is older than the first version that does, or no program of this project. A server
     judges the calls of such a worker by what they say, and names the missing version in what it refuses.
"""

import contextlib
from collections.abc import Iterator

from torch_ps.common.errors import PsError, Refused
from torch_ps.common.pb import parameter_server_pb2 as pb

#: Version of the package.
PACKAGE = "0.2.0"
#: Number of the wire contract.
WIRE = 2


def current() -> pb.Version:
    """The version of this process, to be sent."""
    return pb.Version(package=PACKAGE, wire=WIRE)


def mismatch(peer: str, theirs: pb.Version, here: str) -> str:
    """Compare the version of a peer with that of this process.

    Args:
        peer: the peer, for the message, such as "the server at host:50051".
        theirs: version that it has sent; empty if it has sent none.
        here: this process, for the message, such as "this worker".

    Returns:
        A sentence that names both versions and which side to upgrade; "" if they understand each other.
    """
    if theirs.wire == WIRE:
        return ""
    ours = f"{here} runs torch-ps {PACKAGE} (wire {WIRE})"
    if not theirs.wire:
        return f"{peer} tells no version, as torch-ps of before wire 1 does, and {ours}: upgrade {peer} first"
    older = peer if theirs.wire < WIRE else here
    newer = PACKAGE if theirs.wire < WIRE else theirs.package
    them = f"{peer} runs torch-ps {theirs.package[:40]} (wire {theirs.wire})"
    return f"{them}, and {ours}: upgrade {older} to {newer[:40]} first"


def check(peer: str, theirs: pb.Version, here: str) -> None:
    """Refuse a peer that does not understand this process.

    Raises:
        Refused: names both versions and which side to upgrade.
    """
    if wrong := mismatch(peer, theirs, here):
        raise Refused(wrong)


@contextlib.contextmanager
def naming_the_unversioned(peer: str, theirs: pb.Version, here: str) -> Iterator[None]:
    """Refuse a peer of another wire number; say in the refusals of one that tells no version that it tells none.

    Raises:
        Refused: as ``check`` says.
        PsError: what is raised within, of the same class.
    """
    if theirs.wire:
        check(peer, theirs, here)
        yield
        return
    try:
        yield
    except PsError as error:
        raise type(error)(f"{mismatch(peer, theirs, here)} (refused: {error})") from None
