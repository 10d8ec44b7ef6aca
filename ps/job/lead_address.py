"""Where the lead is: the address of its server and of that one's standby, the likeliest first."""

from collections.abc import Iterable, Iterator, Sequence

from torch_ps.common.errors import ConfigError
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address


class LeadAddress:
    """As another shard knows it.

    Args:
        servers: "host:port" of at least one, where one of them serves or will.
    """

    def __init__(self, servers: Sequence[Address]) -> None:
        self._servers = list(servers)

    @property
    def address(self) -> Address:
        """Where to ask next."""
        return self._servers[0]

    @property
    def several(self) -> bool:
        return len(self._servers) > 1

    def elsewhere(self, than: Address) -> None:
        """That one did not answer, or does not serve: ask the next one, if nobody else has found that out already."""
        if self._servers[0] == than:
            self._servers.append(self._servers.pop(0))

    def told(self, servers: Iterable[str]) -> None:
        """What the lead says about itself; what cannot be read is left out."""
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
