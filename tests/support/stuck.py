"""A server whose disk stops to answer: ``Child("tests.support.stuck:main", (arguments,), log)``.

Its checkpoints go to ``memory://NAME``, where every write waits for ever once the file exists that ``$STUCK`` names.
In place of a minute it gives the disk half a second to write the last checkpoint.
"""

import os
import threading
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
        return super()._open(path, mode, **settings)


def main(arguments: list[str]) -> None:
    fsspec.register_implementation("memory", Stuck, clobber=True)
    checkpointer.FINISH_SECONDS = server.RELEASE_SECONDS = PATIENCE
    serve(arguments)
