"""A switch with long wires: every packet between namespaces waits for its turn on two links, and a while in between.

    node i: tun --> link of i, at its rate --> half a round trip --> link of j, at its rate --> tun of node j

The kernels of many machines have no netem. Here real TCP runs on either side, with the windows and the congestion
control of the namespaces, and sees nothing but a link. Packets are whole segments of up to 64 KiB, as network cards
that segment take them (TSO), so a process in Python keeps up with 1 Gb/s.

Source: tun(4) of Linux, Documentation/networking/tuntap.rst; virtio_net_hdr of the virtio specification, section 5.1.6.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.network import INTERFACE, enter

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PACKET_INFO, _VNET_HEADER = 0x1, 0x1000, 0x4000
_CHECKSUM, _TSO4 = 0x1, 0x2
#: virtio_net_hdr: flags, kind, bytes of headers and of payload of a segment, start and offset of the checksum.
_HEADER = struct.Struct("=BBHHHH")
#: Where the last byte of the destination lies in an IPv4 packet, and bytes of Ethernet around each packet of a wire.
_DESTINATION, _ETHERNET = _HEADER.size + 19, 14
#: Longest packet, with its header.
_LONGEST = _HEADER.size + (1 << 16)
#: Seconds of packets that wait for a link; one more is dropped.
QUEUE_SECONDS = 0.05


def open_tun(interface: str) -> int:
    """Make a tun device in this network namespace; returns its descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _TUN | _NO_PACKET_INFO | _VNET_HEADER))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _CHECKSUM | _TSO4)
    return device


class Switch:
    """Moves packets between tun devices; that of node n has an address that ends in n + 1.

    Args:
        devices: descriptor of each node's device.
        bytes_per_second: rate of each link in either direction.
        delay: seconds from one link to the other.
    """

    def __init__(self, devices: Sequence[int], bytes_per_second: float, delay: float) -> None:
        self._devices, self._rate, self._delay = devices, bytes_per_second, delay
        self._up, self._down = [0.0] * len(devices), [0.0] * len(devices)  # when each link is free
        self._on_the_way: list[deque[tuple[float, bytes]]] = [deque() for _ in devices]
        self._poll = select.poll()
        self._node = {device: node for node, device in enumerate(devices)}
        for device in devices:
            self._poll.register(device, select.POLLIN)

    def run(self) -> None:
        """Move packets for ever."""
        while True:
            ready = self._poll.poll(self._wait())
            for device, _ in ready:
                self._take(self._node[device])
            self._deliver(time.monotonic())

    def _wait(self) -> float | None:
        """Milliseconds until the next packet is there; None: none is on the way."""
        due = [packets[0][0] for packets in self._on_the_way if packets]
        return max(min(due) - time.monotonic(), 0.0) * 1000 if due else None

    def _take(self, node: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):  # then deliver
                packet = os.read(self._devices[node], _LONGEST)
                to = packet[_DESTINATION] - 1 if packet[_HEADER.size] >> 4 == 4 else -1
                if 0 <= to < len(self._devices):
                    self._send(node, to, packet)

    def _send(self, node: int, to: int, packet: bytes) -> None:
        now, seconds = time.monotonic(), _wire_bytes(packet) / self._rate
        sent = max(self._up[node], now)
        there = sent + seconds + self._delay
        received = max(self._down[to], there)
        if max(sent - now, received - there) > QUEUE_SECONDS:
            return
        self._up[node], self._down[to] = sent + seconds, received + seconds
        self._on_the_way[to].append((received, packet))

    def _deliver(self, now: float) -> None:
        for device, packets in zip(self._devices, self._on_the_way, strict=True):
            while packets and packets[0][0] <= now:
                os.write(device, packets.popleft()[1])


def _wire_bytes(packet: bytes) -> int:
    """Bytes that a packet takes on a wire, where it is cut into segments with headers of their own."""
    headers: int
    segment: int
    _, _, headers, segment, _, _ = _HEADER.unpack_from(packet)
    size = len(packet) - _HEADER.size
    more = max(-(-(size - headers) // segment) - 1, 0) if segment else 0
    return size + more * (headers + _ETHERNET) + _ETHERNET


def main() -> None:
    """Arguments: Mb/s of the links, seconds of a round trip, namespaces. Prints a line when the devices are there."""
    megabits, round_trip, *names = sys.argv[1:]
    devices = []
    for name in names:
        enter(name)
        devices.append(open_tun(INTERFACE))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    Switch(devices, float(megabits) * 1e6 / 8, float(round_trip) / 2).run()


if __name__ == "__main__":
    main()
