"""Training and validation text as bytes, from a file, a folder or the standard library.

Rules of this file
  1. Nothing is downloaded. The default is Python's standard library, whose source is on every machine.
  2. The same files give the same split on every machine: files are ordered by the SHA-256 of their relative path.
  3. At most 8 MB are read, so a worker starts fast whatever the path names.

    files by hash   | a b c | d e f g h i j k ... | (not read)
                    ^ 5 %   ^ validation ends     ^ 8 MB

A single file, or a folder of fewer than 20 files, is split by bytes: its last 5 % are validation.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from torch_ps.common.errors import ConfigError

MOST_BYTES = 8_000_000
VALIDATION_SHARE = 0.05
#: Folders with fewer files are split by bytes, because one file could be half of the text.
FEWEST_FILES = 20

#: Folders of the standard library that hold tables or tests of odd input rather than ordinary code.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
)


class Text(NamedTuple):
    """Two disjoint texts, each shape (bytes,), uint8."""

    training: torch.Tensor
    validation: torch.Tensor


def read(path: str = "", *, least: int = 1) -> Text:
    """Read a file or a folder, or the standard library where no path is given.

    Args:
        path: a file of any bytes, or a folder, of which all text files are read recursively, except hidden ones.
        least: smallest number of bytes of each of the two parts.

    Raises:
        ConfigError: the path does not exist, is empty, unreadable or too short; the message names it.
    """
    place = Path(path or sysconfig.get_path("stdlib"))
    if not place.exists():
        raise ConfigError(f"data {str(place)!r} does not exist; give a text file or a folder of them")
    try:
        text = _split_folder(place, library=not path) if place.is_dir() else _split_bytes([_head(place)])
    except OSError as error:
        raise ConfigError(f"data {str(place)!r} cannot be read: {error.strerror or error}") from error
    total = len(text.training) + len(text.validation)
    if total == 0:
        raise ConfigError(f"data {str(place)!r} is empty: no text in it; give a text file or a folder of them")
    if min(len(text.training), len(text.validation)) < least:
        raise ConfigError(
            f"data {str(place)!r} is too short: {total} bytes in all, and both training and validation "
            f"({VALIDATION_SHARE:.0%} of them) need at least {least}"
        )
    return text


def _split_folder(folder: Path, *, library: bool) -> Text:
    files = sorted(_files(folder, library=library), key=lambda name: hashlib.sha256(name.encode()).digest())
    contents: list[bytes] = []
    total = 0
    for name in files:
        content = _head(folder / name)
        if b"\0" in content[:8192] or not content:
            continue
        contents.append(content[: MOST_BYTES - total])
        total += len(contents[-1])
        if total >= MOST_BYTES:
            break
    if len(contents) < FEWEST_FILES:
        return _split_bytes(contents)
    validation, taken = 0, 0
    while taken < VALIDATION_SHARE * total and validation < len(contents) - 1:
        taken += len(contents[validation])
        validation += 1
    return Text(_tensor(contents[validation:]), _tensor(contents[:validation]))


def _files(folder: Path, *, library: bool) -> Iterator[str]:
    """Paths relative to ``folder``, with "/" on every system, in no particular order."""
    for parent, folders, names in os.walk(folder):
        left_out = _LEFT_OUT if library else frozenset({"__pycache__"})
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and (name.endswith(".py") or not library) and path.is_file():
                yield path.relative_to(folder).as_posix()


def _split_bytes(contents: list[bytes]) -> Text:
    whole = _tensor(contents)
    validation = int(len(whole) * VALIDATION_SHARE)
    return Text(whole[: len(whole) - validation], whole[len(whole) - validation :])


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES)


def _tensor(contents: list[bytes]) -> torch.Tensor:
    joined = bytearray(b"\n".join(contents))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
