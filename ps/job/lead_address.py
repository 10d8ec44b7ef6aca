"""Where the lead is, and what another shard shows it.

The addresses are those of the lead's server and of that server's standby, the likeliest first.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence

from torch_ps.common.errors import ConfigError
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.field_ranges import SECRET_BYTES


class LeadAddress:
    """What another shard knows of the lead's addresses. Iterating gives them as "HOST:PORT".

    Args:
        servers: At least one address.

    Attributes:
        secret: Secret that shows the lead which shard calls; a standby has that of its primary, once it follows.
    """

    def __init__(self, servers: Sequence[Address]) -> None:
        self._servers = list(servers)
        self.secret = secrets.token_bytes(SECRET_BYTES)

    @property
    def address(self) -> Address:
        """The address to ask next."""
        return self._servers[0]

    @property
    def several(self) -> bool:
        """Whether there is another address to try."""
        return len(self._servers) > 1

    def skip(self, failed: Address) -> None:
        """Ask another address next, unless someone else has moved on from ``failed`` already."""
        if self._servers[0] == failed:
            self._servers.append(self._servers.pop(0))

    def learn(self, servers: Iterable[str]) -> None:
        """Add addresses that the lead gives of itself; one that cannot be parsed is ignored."""
        for text in servers:
            try:
                found = address.parse(text)
            except ConfigError:
                continue
            if found not in self._servers:
                self._servers.append(found)

    def __iter__(self) -> Iterator[str]:
        return iter([str(each) for each in self._servers])

    def __str__(self) -> str:
        return " or ".join(self)
