"""Limit of the files and connections that a process may have open (``ulimit -n``): raised as far as that is allowed.

The soft limit of most systems, 1024, is there for programs that use select, which none here does.

Source: getrlimit(2).
"""

import contextlib
import resource

from torch_ps.common.errors import ConfigError

#: Open files of an idle server, and those that a worker adds: connections, socket and regions of shared memory.
IDLE, PER_WORKER = 40, 8


def allow_open_files(num_workers: int) -> None:
    """Raise the limit of this process to what the system allows.

    Args:
        num_workers: Number of workers that a server has to serve at the least.

    Raises:
        ConfigError: That is too few for them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    needed = IDLE + PER_WORKER * num_workers
    if soft != resource.RLIM_INFINITY and soft < needed:
        workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
        raise ConfigError(
            f"this process may open {soft} files, and a server of {workers} needs {needed}; raise the limit, with "
            f"ulimit -n {needed} or LimitNOFILE of systemd"
        )
