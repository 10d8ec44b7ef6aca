"""Addresses: "host:port" texts, lists of them, and whether one is of this machine only.

Rules of this file
  1. Addresses are parsed as text: no name is resolved, no socket is opened.
  2. IPv6 addresses stand in brackets, as in URLs: ``[::1]:50051``.

Source: RFC 3986, section 3.2.2, for the brackets.
"""

import ipaddress
import re
from typing import NamedTuple

from torch_ps.common.errors import ConfigError

_FORM = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[A-Za-z0-9_.-]+)):(?P<port>[0-9]{1,5})", re.ASCII)


class Address(NamedTuple):
    """A host name or IP address without brackets, and a TCP port; 0 is any free port, for a server to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it; a name other than localhost counts as reachable from outside."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse(text: str, *, free_port: bool = False) -> Address:
    """Read "host:port".

    Args:
        text: text that a user wrote; spaces around it are ignored.
        free_port: whether port 0 is allowed, as for an address to listen on.

    Raises:
        ConfigError: the text is not of that form; quotes it.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"an address must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051; got {text!r}")
    address = Address(match["v6"] or match["host"], int(match["port"]))
    if match["v6"]:
        try:
            ipaddress.IPv6Address(address.host)
        except ValueError:
            raise ConfigError(f"{address.host!r} in {text!r} is not an IPv6 address") from None
    if address.port > 65535 or (address.port == 0 and not free_port):
        raise ConfigError(f"a port must be between {0 if free_port else 1} and 65535; got {address.port} in {text!r}")
    return address


def parse_list(text: str) -> tuple[Address, ...]:
    """Read "host:port,host:port": at least one address, none of them twice, in the order of the shards.

    Raises:
        ConfigError: an address is malformed or repeated, or there is none; quotes the text.
    """
    addresses = tuple(parse(each) for each in text.split(",") if each.strip())
    if not addresses:
        raise ConfigError(f"a list of servers must be HOST:PORT[,HOST:PORT...]; got {text!r}")
    for place, address in enumerate(addresses):
        if address in addresses[:place]:
            raise ConfigError(f"a list of servers must name each shard once; {address} stands twice in {text!r}")
    return addresses


def parse_servers(text: str) -> tuple[tuple[Address, ...], ...]:
    """Read "host:port|host:port,host:port": the servers of each shard, in the order of the shards.

    Raises:
        ConfigError: an address is malformed or repeated, or there is none; quotes the text.
    """
    shards = tuple(tuple(parse(each) for each in shard.split("|")) for shard in text.split(",") if shard.strip())
    parse_list(text.replace("|", ","))
    return shards
