"""Emulates machines on a switch by network namespaces: each node has one link with a rate limit in each direction.

    node 0: link0 --tbf--> . . . . . . . . <--tbf-- port0 |
    node 1: link0 --tbf--> . . veth  . . . <--tbf-- port1 | bridge of the namespace "switch"
    ...

The switch is a namespace too, so nothing of the host's own network is touched and all goes with the namespaces. A node
sends through the token bucket of its end and receives through that of the switch's.

Source: ip-netns(8), veth(4), tc-tbf(8).
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERFACE = "link0"
_PREFIX = "torch-ps"
_CLONE_NEWNET = 0x40000000
#: A bucket has to hold a whole segment that was not cut yet (64 KiB); the queue before it is that of a small switch.
_BURST, _LATENCY = "256kb", "50ms"


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
def network(nodes: int, megabits: int) -> Iterator[Network]:
    """Set up nodes with links of a rate in Mb/s; on exit, end every process in them.

    Raises:
        NoNetwork: this system has no namespaces, veth, bridge or tbf.
    """
    check()
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
