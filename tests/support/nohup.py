"""A server as ``nohup`` starts it: with SIGHUP ignored."""

import signal
from pathlib import Path

from torch_ps.ps.server.cli import main


def nohup(arguments: list[str]) -> None:
    """In a child: ``nohup ps-serve ARGUMENTS``."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    main(arguments)


def ignores_hangup(pid: int) -> bool:
    """Whether a process has SIGHUP ignored now."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    return bool(int(fields["SigIgn"], 16) & 1 << signal.SIGHUP - 1)
