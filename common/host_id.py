"""Which host this is: two processes with one id share memory and Unix sockets."""

import os
from pathlib import Path


def host_id() -> str:
    """Boot id of the kernel and network namespace of this process; "" where the system has neither.

    A network namespace counts as a host of its own: traffic that leaves one is meant to use its links.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{kernel} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""
