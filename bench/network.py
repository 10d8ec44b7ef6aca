"""Emulates machines on a switch by network namespaces: each node has one link with a rate limit in each direction.

    node 0: link0 --tbf--> . . . . . . . . <--tbf-- port0 |
    node 1: link0 --tbf--> . . veth  . . . <--tbf-- port1 | bridge of the namespace "switch"
    ...

The switch is a namespace too, so nothing of the host's own network is touched and all goes with the namespaces. A node
sends through the token bucket of its end and receives through that of the switch's. With a round trip the switch is a
process, ``bench/long_wires.py``, and TCP has the buffers that Linux begins with, and this kernel's congestion control.

Source: ip-netns(8), veth(4), tc-tbf(8), tcp(7).
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERFACE = "link0"
_PREFIX = "torch-ps"
_CLONE_NEWNET = 0x40000000
#: A bucket has to hold a whole segment that was not cut yet (64 KiB); the queue before it is that of a small switch.
_BURST, _LATENCY = "256kb", "50ms"
#: Buffers of TCP in the namespaces of long wires: those of Linux, whatever this machine was set to.
_TCP = {
    "tcp_rmem": "4096 131072 6291456",
    "tcp_wmem": "4096 16384 4194304",
}


class NoNetwork(Exception):
    """Links cannot be emulated on this system; the message names what is missing."""


class Network:
    """Namespaces by node number; ``address`` is a node's on its link."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def address(self, node: int) -> str:
        return f"10.0.0.{node + 1}"

    def command(self, node: int, command: list[str]) -> list[str]:
        """Command line that runs ``command`` on a node."""
        return ["ip", "netns", "exec", self.names[node], *command]


def enter(name: str) -> None:
    """Move this thread, and threads that it starts, to a node."""
    with Path("/run/netns", name).open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")


def check() -> None:
    """Check that links can be emulated.

    Raises:
        NoNetwork: links cannot be emulated.
    """
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if os.geteuid() != 0:
        raise NoNetwork("network namespaces need root; run it as root")
    if missing:
        raise NoNetwork(f"{' and '.join(missing)} not found; install iproute2")


@contextmanager
def network(nodes: int, megabits: int, round_trip: float = 0.0) -> Iterator[Network]:
    """Set up nodes with links of a rate in Mb/s; on exit, end every process in them.

    Args:
        nodes: number of nodes.
        megabits: rate of each link in either direction.
        round_trip: seconds of a round trip between two nodes; 0 for that of this machine.

    Raises:
        NoNetwork: this system has no namespaces, or neither veth, bridge and tbf nor, for a round trip, tun.
    """
    check()
    if round_trip:
        with _long_wires(nodes, megabits, round_trip) as found:
            yield found
        return
    _sweep()
    names = [f"{_PREFIX}-{os.getpid()}-{node}" for node in range(nodes)]
    switch = f"{_PREFIX}-{os.getpid()}-switch"
    found = Network(names)
    try:
        _do("ip netns add", switch)
        _do("ip -n", switch, "link add bridge type bridge")
        _do("ip -n", switch, "link set bridge up")
        for node, name in enumerate(names):
            port = f"port{node}"
            _do("ip netns add", name)
            _do("ip link add", port, "netns", switch, "type veth peer name", INTERFACE, "netns", name)
            _do("ip -n", switch, "link set", port, "master bridge up")
            _do("ip -n", name, "address add", f"{found.address(node)}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _do("ip -n", name, "link set", interface, "up")
            for namespace, interface in ((name, INTERFACE), (switch, port)):
                rate = f"rate {megabits}mbit burst {_BURST} latency {_LATENCY}"
                _do("tc -n", namespace, "qdisc add dev", interface, "root tbf", rate)
        yield found
    finally:
        for name in (*names, switch):
            _remove(name)


@contextmanager
def _long_wires(nodes: int, megabits: int, round_trip: float) -> Iterator[Network]:
    _sweep()
    found = Network([f"{_PREFIX}-{os.getpid()}-{node}" for node in range(nodes)])
    try:
        for name in found.names:
            _do("ip netns add", name)
        command = [sys.executable, str(Path(__file__).with_name("long_wires.py")), str(megabits), str(round_trip)]
        with subprocess.Popen([*command, *found.names], stdout=subprocess.PIPE) as switch:
            try:
                if switch.stdout is None or not switch.stdout.readline():
                    raise NoNetwork("the switch of long wires did not start; its own message is above")
                for node, name in enumerate(found.names):
                    _do("ip -n", name, "address add", f"{found.address(node)}/24", "dev", INTERFACE)
                    for interface in ("lo", INTERFACE):
                        _do("ip -n", name, "link set", interface, "up")
                    for setting, value in _TCP.items():
                        _set(name, setting, value)
                yield found
            finally:
                switch.kill()
    finally:
        for name in found.names:
            _remove(name)


def _set(name: str, setting: str, value: str) -> None:
    """Set a setting of TCP in a namespace."""
    write = f"echo {value} > /proc/sys/net/ipv4/{setting}"
    subprocess.run(["ip", "netns", "exec", name, "sh", "-c", write], check=True)


def _do(*words: str) -> None:
    command = " ".join(words)
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNetwork(f"{command!r} failed: {done.stderr.strip()}")


def _remove(name: str) -> None:
    """Remove a namespace after ending the processes in it."""
    if not Path("/run/netns", name).exists():
        return
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in inside.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _sweep() -> None:
    """Remove the namespaces that a killed run has left."""
    for path in Path("/run/netns").glob(f"{_PREFIX}-*"):
        owner = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            _remove(path.name)
