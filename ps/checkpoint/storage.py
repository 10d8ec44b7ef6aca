"""Where checkpoints are: a folder, or any URL that fsspec knows, such as s3://bucket/folder.

Rules of this file
  1. A file appears whole or not at all. In a folder: written beside its name, brought to the disk, renamed, and the
     rename brought to the disk. An object store shows an object when its last byte is there.
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
    """What a file has to be: its name, its size in bytes and its SHA-256, hexadecimal."""

    name: str
    size: int
    sha256: str


class Storage:
    """The files below ``url``.

    Raises:
        ConfigError: nothing here can read such URLs; says what to install.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # Listings that another process may have changed must not come from memory.
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
        """A file's full name, for people."""
        return f"{self.url}/{name}"

    def write(self, name: str, parts: Iterable[Buffer]) -> FileFact:
        """Write a file. On an error there is none.

        Raises:
            OSError: the disk is full, or whatever the file system says.
        """
        digest, size = hashlib.sha256(), 0
        with self._new_local(name) if self._local else self._fs.open(self._path(name), "wb") as file:
            for part in parts:
                digest.update(part)
                size += len(part)
                file.write(part)
        return FileFact(name, size, digest.hexdigest())

    def read(self, name: str, most: int) -> bytes:
        """A small file.

        Raises:
            CheckpointError: it is not there, cannot be read, or has more than ``most`` bytes.
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
        """Compare a file with what it has to be; its bytes too if ``whole``.

        Raises:
            CheckpointError: says how it differs.
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
            CheckpointError: as ``check``.
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
        """Names of the folders directly below; [] where there is nothing yet."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(str(each["name"]).rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def rename(self, folder: str, name: str) -> None:
        """Give a folder another name; one that has it is removed. In an object store each file is copied."""
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
    """A raw file whose ``write`` leaves nothing out."""

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
