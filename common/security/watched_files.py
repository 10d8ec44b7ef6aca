"""Files that are read again when they change: certificates, keys and tokens, renewed while a process runs.

    value --> changed since the last look? --no--> the value made before
                                           --yes-> read all, make the value; if refused, keep the old one, log once

Rules of this file
  1. A value is made from all files together, never from a mixture of two states of them.
  2. The first reading raises errors; a later one keeps the last good value.

Cost: one ``stat`` per file and look.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from torch_ps.common.errors import ConfigError

log = logging.getLogger("torch_ps")

#: Most bytes of a file, more than any certificate chain has: a device or a wrong file must not fill the memory.
MAX_BYTES = 1 << 20

T = TypeVar("T")
_Marks = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """The value that ``make`` computes from the contents of files.

    Args:
        paths: path of each file, by the name of the option that gives it.
        make: function of the contents, in the order of ``paths``.

    Raises:
        ConfigError: a file cannot be read, or ``make`` refuses what is in it.
    """

    def __init__(self, paths: Mapping[str, str], make: Callable[[Sequence[bytes]], T]) -> None:
        self._options, self.paths, self._make = tuple(paths), tuple(paths.values()), make
        self._marks = self._look()
        self._value = self._read()

    @property
    def value(self) -> T:
        self.refresh()
        return self._value

    def refresh(self) -> bool:
        """Read the files again if they changed. Returns whether there is a new value."""
        marks = self._look()
        if marks == self._marks:
            return False
        try:
            value = self._read()
        except ConfigError as error:
            log.warning("%s; the content read before stays in use", error)
            self._marks = marks
            return False
        if marks != self._look():
            return False  # they are being written; the next call reads them whole
        self._marks, self._value = marks, value
        log.info("%s changed and is read again", ", ".join(self.paths))
        return True

    def _look(self) -> _Marks:
        return tuple(map(_mark, self.paths))

    def _read(self) -> T:
        return self._make([_content(*each) for each in zip(self._options, self.paths, strict=True)])


def _mark(path: str) -> tuple[int, int, int] | None:
    """Time, size and inode of a file, by which a change is recognised; None if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _content(option: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {option} {path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{option} {path} is larger than {MAX_BYTES} bytes; it is no certificate, key or token")
    return content
