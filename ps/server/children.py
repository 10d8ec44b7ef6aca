"""The child processes of one ps-serve: servers that it starts, waits for and ends together.

with ServerChildren() as children:  start() --> wait_for() --> ... --> wait()
                                    SIGTERM, SIGINT, SIGHUP or the end of one child --> all are ended
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from torch_ps.common.end_patience import Patience, show_work
from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.options.command_line import arguments_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.parent_death import Lifeline
from torch_ps.common.slow_start import SlowStart

log = logging.getLogger("torch_ps.ps")

#: Seconds in which the shards have to stop.
STOP_SECONDS = 10.0
#: The same if they write a last checkpoint; anew whenever they have written a part of it.
CHECKPOINT_SECONDS = 75.0
#: Seconds between two looks at children that were told to stop.
LOOK_SECONDS = 0.1


class ServerChildren:
    """Servers that are child processes of this one. Leaving the context ends those that still run.

    Args:
        checkpoints: whether they write a last checkpoint when they are ended.
        seconds: further seconds in which they have to stop, as parents of servers have to.
        ready_file: ready file of this process, with which it says that a child still works; "": nobody looks.

    Attributes:
        failed: whether a child has ended by itself.
        ended_badly: whether a child had an error at its end, such as a last checkpoint that failed; set by the end of
            the context.
    """

    def __init__(self, *, checkpoints: bool, seconds: float = 0.0, ready_file: str = "") -> None:
        self.failed = self.ended_badly = False
        self._checkpoints, self._ready_file = checkpoints, ready_file
        self._stop_seconds = (CHECKPOINT_SECONDS if checkpoints else STOP_SECONDS) + seconds
        self._signals: list[int] = []
        self._lifeline = Lifeline()
        self._children: list[subprocess.Popen[bytes]] = []
        self._ready_files: list[Path] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ps-serve-")
        self._files = 0
        for number in ending_signals():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def new_ready_file(self) -> str:
        """Path of a ready file for the next child."""
        self._files += 1
        return str(Path(self._folder.name, str(self._files)))

    def start(self, config: ServerConfig) -> None:
        """Start a child with the options of ``config``."""
        # The environment has been read into ``config``; the child must not read it again.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PS_")} | self._lifeline.environment
        child = subprocess.Popen(
            [sys.executable, "-m", "torch_ps.ps.server.cli", *arguments_of(config)],
            env=environment,
            pass_fds=self._lifeline.fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its children in order
        )
        self._children.append(child)
        self._ready_files.append(Path(config.ready_file))

    def wait_for(self, ready: str) -> dict[str, Any] | None:
        """Wait for the ready file of a child. Returns what it says; None if a signal came or a child has ended."""
        slow = SlowStart()
        while not self._signals:
            if Path(ready).exists():
                told: dict[str, Any] = json.loads(Path(ready).read_text(encoding="utf-8"))
                return told
            if self._any_ended:
                self.failed = True
                return None
            slow.tell()
            time.sleep(0.02)
        return None

    def wait(self) -> None:
        """Wait until a signal comes or a child ends."""
        while not self._signals and not self._any_ended:
            time.sleep(0.1)
        self.failed = not self._signals

    @property
    def _any_ended(self) -> bool:
        return any(child.poll() is not None for child in self._children)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = [self._checkpoints and file.exists() for file in self._ready_files]  # by those that have listened
        for child in self._children:
            child.terminate()
        patience = [Patience(file, self._stop_seconds) for file in self._ready_files]
        renewals = 0
        while left := [
            (c, p) for c, p in zip(self._children, patience, strict=True) if c.poll() is None and not p.over
        ]:
            if renewals != (renewals := sum(each.renewals for each in patience)):
                show_work(self._ready_file)
            with suppress(subprocess.TimeoutExpired):
                left[0][0].wait(LOOK_SECONDS)
        for child in self._children:
            if child.poll() is None:
                cut = "; the checkpoint that it was writing is cut short, the one before is good" * self._checkpoints
                log.error("process %d did not end within %g s and is killed%s", child.pid, self._stop_seconds, cut)
                child.kill()
                child.wait()
        # Nothing is lost with a server that had to be killed and kept nothing.
        self.ended_badly = any(
            child.returncode > 0 or (keeps and child.returncode)
            for child, keeps in zip(self._children, kept, strict=True)
        )
        self._folder.cleanup()
