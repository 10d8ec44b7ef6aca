"""A filter of the kernel that drops what certain hosts send to a listening socket, so that they cannot connect.

    hosts --program--> classic BPF --attach--> listening socket: their SYNs are dropped; open connections go on

Rules of this file
  1. An IPv6 host is its network of 64 bits, as a single machine may have all addresses of it.
  2. Accepted sockets inherit the filter; it names other hosts than theirs.

Source: https://docs.kernel.org/networking/filter.html; linux/filter.h for the codes.
"""

import ctypes
import ipaddress
import socket
import struct
from collections.abc import Iterable

_SO_ATTACH_FILTER = 26
#: Codes: load a byte or a word of the packet, shift right, jump, jump if equal, return.
_LOAD_BYTE, _LOAD_WORD, _SHIFT, _JUMP, _IF_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x05, 0x15, 0x06
#: Offset of the network header; source addresses are at 12 in IPv4 and at 8 in IPv6.
_NETWORK = 0xFFF00000
_ALL = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]  # code, instructions to skip if true, if false, operand


def host_of(address: str) -> str:
    """What is banned for what an address has done: itself, or the network of an IPv6 address."""
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address, 64), strict=False).network_address)


def refuse_all(listening: socket.socket) -> None:
    """Drop what anybody sends to ``listening`` from now on.

    Raises:
        OSError: The kernel does not take filters.
    """
    _attach(listening, [(_RETURN, 0, 0, 0)])


def program(hosts: Iterable[str]) -> list[Instruction]:
    """Instructions that drop the packets of ``hosts``, at most 800 IPv4 or IPv6 addresses."""
    old, new = list[Instruction](), list[Instruction]()
    for host in hosts:
        address = ipaddress.ip_address(host)
        if address.version == 4:
            old += [(_IF_EQUAL, 0, 1, int(address)), (_RETURN, 0, 0, 0)]
        else:
            high, low = struct.unpack("!II", address.packed[:8])
            new += [
                (_LOAD_WORD, 0, 0, _NETWORK + 8),
                (_IF_EQUAL, 0, 3, high),
                (_LOAD_WORD, 0, 0, _NETWORK + 12),
                (_IF_EQUAL, 0, 1, low),
                (_RETURN, 0, 0, 0),
            ]
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK),
        (_SHIFT, 0, 0, 4),
        (_IF_EQUAL, 0, 1, 4),
        (_JUMP, 0, 0, 1),
        (_JUMP, 0, 0, len(old) + 2),  # to those of IPv6
        (_LOAD_WORD, 0, 0, _NETWORK + 12),
        *old,
        (_RETURN, 0, 0, _ALL),
        *new,
        (_RETURN, 0, 0, _ALL),
    ]


def attach(listening: socket.socket, hosts: Iterable[str]) -> None:
    """Drop what ``hosts`` send to ``listening`` from now on, and no longer what others send.

    Raises:
        OSError: The kernel does not take filters.
    """
    _attach(listening, program(hosts))


def _attach(listening: socket.socket, instructions: list[Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *each) for each in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    listening.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(instructions), ctypes.addressof(buffer))
    )
