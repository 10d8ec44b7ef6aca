"""The file with which a server tells the process that started it where it listens (``--ready-file``)."""

import json
import os
from collections.abc import Sequence


def write_ready(path: str, servers: Sequence[str], metrics: Sequence[str]) -> None:
    """Write the file as a whole: a reader that finds it can parse it.

    Args:
        servers: texts that make ``$PS_SERVERS`` with commas between them: "HOST:PORT" of every shard, by index; with
            several models one text, "NAME=HOST:PORT,...;NAME=HOST:PORT,...".
        metrics: "HOST:PORT" of every HTTP server for metrics; empty where they are off.

    Raises:
        OSError: the file system refuses.
    """
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump({"servers": [*servers], "metrics": [*metrics]}, file)
    os.replace(f"{path}.part", path)
