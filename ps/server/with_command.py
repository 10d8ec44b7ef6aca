"""ps-serve OPTIONS -- COMMAND: runs the servers of a job for as long as a command, such as torchrun, runs the workers.

    ps-serve --> servers (a ps-serve of its own) --ready--> COMMAND with $PS_SERVERS
                                                   SIGTERM, SIGINT, SIGHUP --> COMMAND
                 servers end <-- COMMAND ends; its exit code is that of ps-serve, or if that is 0 that of the servers

Rules of this file
  1. The command gets the addresses of the servers and their token file in its environment; the rest is the caller's.
  2. When the servers end first, the command is ended too: nothing it computes would reach them.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from torch_ps.common.end_patience import Patience
from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.command_line import arguments_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.parent_death import Lifeline
from torch_ps.common.slow_start import SlowStart
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.job_servers import JobServers, format_jobs, parse_jobs
from torch_ps.ps.server.children import CHECKPOINT_SECONDS, STOP_SECONDS

log = logging.getLogger("torch_ps.ps")

#: Seconds in which a command without servers has to end: its workers give up their step first.
COMMAND_SECONDS = 40.0
#: Seconds between two checks of both processes.
LOOK_EVERY = 0.1
#: Addresses that listen on every interface, and the one to call instead on this machine.
EVERY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve_during(config: ServerConfig, command: Sequence[str]) -> int:
    """Serve while ``command`` runs. Returns its exit code, or 128 + the signal that ended it.

    Where the command ends with 0 and the servers do not, as when their last checkpoint fails, it is the code of these.

    Raises:
        ConfigError: The command does not exist.
    """
    if shutil.which(command[0]) is None:
        if Path(command[0]).is_file():
            raise ConfigError(f"the command {command[0]!r} is not executable; try chmod +x")
        raise ConfigError(f"there is no command {command[0]!r}")
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in ending_signals():
        signal.signal(number, note)
    lifeline = Lifeline()
    with tempfile.TemporaryDirectory(prefix="ps-serve-") as folder:
        ready = Path(config.ready_file or Path(folder, "ready")).absolute()
        ready.unlink(missing_ok=True)
        servers = subprocess.Popen(
            [sys.executable, "-m", "torch_ps.ps.server.cli", *arguments_of(replace(config, ready_file=str(ready)))],
            # The environment has been read into ``config``; the child must not read it again.
            env={k: v for k, v in os.environ.items() if not k.startswith("PS_")} | lifeline.environment,
            pass_fds=lifeline.fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command; the servers end after it
        )
        try:
            told = _wait_for(ready, servers, signals)
            code = 128 + signals[0] if told is None else _run(command, _environment(config, told), servers, signals)
        finally:
            _end(servers, CHECKPOINT_SECONDS if config.checkpoint else STOP_SECONDS, ready)
        # Without checkpoints nothing is lost with servers that had to be killed.
        if not code and (servers.returncode > 0 or (config.checkpoint and servers.returncode)):
            log.error("%s has ended well, but the servers have not; their own lines above say why", command[0])
            return exit_code(servers)
        return code


def _wait_for(ready: Path, servers: "subprocess.Popen[bytes]", signals: list[int]) -> str | None:
    """The servers, once they listen, as in ``$PS_SERVERS``; None if a signal came first."""
    slow = SlowStart()
    while not ready.exists():
        if signals:
            return None
        if servers.poll() is not None:
            sys.exit(servers.returncode or 1)  # its own lines say why
        slow.tell()
        time.sleep(LOOK_EVERY / 5)
    return ",".join(json.loads(ready.read_text(encoding="utf-8"))["servers"])


def _environment(config: ServerConfig, told: str) -> dict[str, str]:
    """The caller's environment, with the servers of this job and their token file."""
    jobs = [
        JobServers(job.name, tuple(tuple(Address(EVERY.get(a.host, a.host), a.port) for a in s) for s in job.shards))
        for job in parse_jobs(told)
    ]
    token = {"PS_TOKEN_FILE": str(Path(config.token_file).absolute())} if config.token_file else {}
    return {**os.environ, "PS_SERVERS": format_jobs(jobs), **token}


def _run(
    command: Sequence[str], environment: Mapping[str, str], servers: "subprocess.Popen[bytes]", signals: list[int]
) -> int:
    child, passed_on = subprocess.Popen(command, env=environment), 0
    while child.poll() is None:
        if servers.poll() is not None:
            log.error("the servers have ended, so %s ends; their own lines above say why", command[0])
            _end(child, COMMAND_SECONDS)
            return servers.returncode or 1
        for number in signals[passed_on:]:
            passed_on += 1
            if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal sends Ctrl-C to all of its processes
                child.send_signal(number)
        time.sleep(LOOK_EVERY)
    return exit_code(child)


def exit_code(ended: "subprocess.Popen[bytes]") -> int:
    """Exit code of a process as a shell reports it: 128 + number for a signal."""
    return ended.returncode if ended.returncode >= 0 else 128 - ended.returncode


def _end(process: "subprocess.Popen[bytes]", seconds: float, ready: Path | None = None) -> None:
    """End a process: SIGTERM, then SIGKILL after so many seconds, anew whenever its ready file says that it works."""
    process.terminate()
    patience = Patience(ready or "", seconds)
    while process.poll() is None and not patience.over:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_EVERY)
    if process.poll() is None:
        log.error("process %d did not end within %g s and is killed", process.pid, seconds)
        process.kill()
        process.wait()
