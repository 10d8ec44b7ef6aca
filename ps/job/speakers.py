"""Who may speak for a worker or a shard: whoever shows the secret with which it joined or entered.

    Join, Enter --secret--> digest_of --> Membership, Incarnation --roster, records--> every server: Speakers
    any later call --secret--> shows: is its digest that of the session? --> else refused

Rules of this file
  1. Secrets stay in the processes that drew them. Rosters, checkpoints and the records for a standby have digests, from
     which nobody finds the secret. Only the standby of a shard gets the secret of that shard, as it may become it.
  2. A secret is checked once per stream and per unary call, never per push.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable

from torch_ps.common.errors import ProtocolError, UnknownWorker
from torch_ps.common.wire.field_ranges import SECRET_BYTES
from torch_ps.ps.core.roster import Member, SessionKey


def digest_of(secret: bytes, who: str) -> str:
    """First half of the SHA-256 of a secret, hexadecimal.

    Args:
        who: Caller, for the message.

    Raises:
        ProtocolError: A secret has another length.
    """
    if len(secret) != SECRET_BYTES:
        raise ProtocolError(f"{who} shows a secret of {len(secret)} bytes; it has {SECRET_BYTES}, drawn at random")
    return hashlib.sha256(secret).hexdigest()[: 2 * SECRET_BYTES]


def shows(secret: bytes, digest: str) -> bool:
    """Whether a secret is that of a digest, compared in constant time; the digest "" has none."""
    return bool(digest) and hmac.compare_digest(hashlib.sha256(secret).hexdigest()[: 2 * SECRET_BYTES], digest)


class Speakers:
    """The digests of all sessions that may speak at one server.

    Args:
        electorate: Gives the sessions that may vote, also those that have left the roster meanwhile.
    """

    def __init__(self, electorate: Callable[[], Iterable[SessionKey]] = tuple) -> None:
        self.electorate = electorate
        self._digests: dict[SessionKey, str] = {}

    def learn(self, members: Iterable[Member]) -> None:
        """Admit the members of a new roster, and nobody else but the electorate."""
        stay = {key: self._digests[key] for key in self.electorate() if key in self._digests}
        self._digests = stay | {m.key: m.digest for m in members}

    def check(self, worker: str, session: int, secret: bytes) -> None:
        """Refuse a call in the name of a worker that is not that worker's.

        Raises:
            UnknownWorker: The session is not in the roster, or its secret is another one.
        """
        digest = self._digests.get((worker, session))
        if digest is None:
            raise UnknownWorker(f"worker {worker!r} (session {session}) is not in the roster; join again")
        if not shows(secret, digest):
            raise UnknownWorker(
                f"worker {worker!r} (session {session}) is another process, as it has joined with another secret; "
                "join under a name of your own"
            )
