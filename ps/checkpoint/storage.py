"""File access for checkpoints: a folder, or any URL that fsspec knows, such as s3://bucket/folder.

Rules of this file
  1. A file appears whole or not at all. In a folder it is written under another name, synced, renamed, and the rename
     is synced. An object store shows an object once its last byte has arrived.
  2. Names are relative, with "/" between their parts. Nothing here knows what a checkpoint is.
  3. Everything blocks; callers have a thread for it.

Source: https://lwn.net/Articles/457667/ for what fsync is needed where; fsspec for all but local files.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.common.wire.frames import Buffer

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class FileFact:
    """Name of a file, its expected size in bytes and its expected SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class Storage:
    """The files below ``url``.

    Raises:
        ConfigError: No installed package can read such URLs; the message says what to install.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # No cached listings: another process may have changed the folder.
            self._fs: Any
            self._fs, root = fsspec.core.url_to_fs(self.url or "/", use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoints cannot go to {url!r}: {error}; for s3:// install torch-ps[s3], else the fsspec package "
                "of that protocol"
            ) from None
        self._local = isinstance(self._fs, LocalFileSystem)
        self._root = str(root).rstrip("/")

    def place(self, name: str) -> str:
        """Full name of a file, for messages."""
        return f"{self.url}/{name}"

    def write(self, name: str, parts: Iterable[Buffer]) -> FileFact:
        """Write a file; after an error it does not exist.

        Raises:
            OSError: The disk is full, or the file system refuses for another reason.
        """
        digest, size = hashlib.sha256(), 0
        with self._new_local(name) if self._local else self._fs.open(self._path(name), "wb") as file:
            for part in parts:
                digest.update(part)
                size += len(part)
                file.write(part)
        return FileFact(name, size, digest.hexdigest())

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a small file.

        Raises:
            CheckpointError: It is missing, cannot be read, or has more than ``most`` bytes.
        """
        try:
            with self._fs.open(self._path(name), "rb") as file:
                data: bytes = file.read(most + 1)
        except FileNotFoundError:
            raise CheckpointError(f"{self.place(name)} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{self.place(name)} cannot be read: {error}") from None
        if len(data) > most:
            raise CheckpointError(f"{self.place(name)} has more than {most} bytes, so it is no manifest")
        return data

    def check(self, fact: FileFact, *, whole: bool) -> None:
        """Compare a file with its expected size and, if ``whole``, its digest.

        Raises:
            CheckpointError: They differ; the message says how.
        """
        path, place = self._path(fact.name), self.place(fact.name)
        try:
            size = int(self._fs.size(path))
            if size != fact.size:
                what = "is truncated" if size < fact.size else "is too long"
                raise CheckpointError(f"{place} {what}: it has {size} bytes in place of {fact.size}")
            if not whole:
                return
            digest = hashlib.sha256()
            with self._fs.open(path, "rb", block_size=_CHUNK) as file:
                while part := file.read(_CHUNK):
                    digest.update(part)
        except FileNotFoundError:
            raise CheckpointError(f"{place} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from None
        if digest.hexdigest() != fact.sha256:
            raise CheckpointError(f"{place} is damaged: its SHA-256 is not the one that was written down")

    @contextlib.contextmanager
    def local(self, fact: FileFact) -> Iterator[str]:
        """Path of a checked file on this machine, inside the context: itself, or a temporary copy.

        Raises:
            CheckpointError: The file differs from ``fact``; the message says how.
        """
        self.check(fact, whole=True)
        if self._local:
            yield self._path(fact.name)
            return
        with tempfile.TemporaryDirectory(prefix="torch-ps-") as folder:
            path = str(Path(folder, "file"))
            try:
                self._fs.get_file(self._path(fact.name), path)
            except OSError as error:
                raise CheckpointError(f"{self.place(fact.name)} cannot be read: {error}") from None
            yield path

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path(name)))

    def folders(self) -> list[str]:
        """Names of the folders directly below the URL; [] if it does not exist yet."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(str(each["name"]).rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def rename(self, folder: str, name: str) -> None:
        """Rename a folder, replacing one of that name. In an object store every file is copied."""
        self.remove(name)
        if self._local:
            os.rename(self._path(folder), self._path(name))
            return
        for path in self._fs.find(self._path(folder)):
            self._fs.cp_file(path, self._path(name) + str(path).removeprefix(self._path(folder)))
        self.remove(folder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _new_local(self, name: str) -> Iterator[Any]:
        path = Path(self._path(name))
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb", buffering=0) as raw:
                yield _Whole(raw)
                os.fsync(raw.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        for folder in {path.parent, *(each.parent for each in made)}:
            _sync_folder(folder)


class _Whole:
    """A raw file whose ``write`` writes everything."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def write(self, part: Buffer) -> None:
        view = memoryview(part).cast("B")
        while len(view):
            view = view[self._raw.write(view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
