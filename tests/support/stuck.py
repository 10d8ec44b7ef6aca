"""A server whose disk is slow or stops to answer: ``Child("tests.support.stuck:main", (arguments,), log)``.

Its checkpoints go to ``memory://NAME``, where every file waits for ever once the file exists that ``$STUCK`` names, and
every part of a file takes ``$SLOW`` seconds. In place of a minute it gives the disk half a second without progress.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from torch_ps.ps.checkpoint import checkpointer
from torch_ps.ps.server import server
from torch_ps.ps.server.cli import main as serve

PATIENCE = 0.5


class Stuck(MemoryFileSystem):  # type: ignore[misc]
    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if "w" in mode and Path(os.environ["STUCK"]).exists():
            threading.Event().wait()
        file = super()._open(path, mode, **settings)
        if "w" in mode and os.environ.get("SLOW"):
            write = file.write

            def slow(part: Any) -> Any:
                time.sleep(float(os.environ["SLOW"]))
                return write(part)

            file.write = slow
        return file


def main(arguments: list[str]) -> None:
    fsspec.register_implementation("memory", Stuck, clobber=True)
    checkpointer.FINISH_SECONDS = server.RELEASE_SECONDS = PATIENCE
    serve(arguments)
