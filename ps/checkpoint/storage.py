"""File access for checkpoints: a folder, or any URL that fsspec knows, such as s3://bucket/folder.

Rules of this file
  1. A file appears whole or not at all. In a folder it is written under another name, synced, renamed, and the rename
     is synced. An object store shows an object once its last byte has arrived.
  2. Names are relative, with "/" between their parts. Nothing here knows what a checkpoint is.
  3. Everything blocks; callers have a thread for it. Only the first contact has a deadline, so that a place that does
     not answer, or refuses, is one line at the start.
  4. Only regular files are read: to open a FIFO waits for its writer, and a device has no end.

Source: https://lwn.net/Articles/457667/ for what fsync is needed where; fsspec for all but local files.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from torch_ps.common.errors import CheckpointError, ConfigError
from torch_ps.common.wire.frames import Buffer

log = logging.getLogger("torch_ps.ps")

_CHUNK = 8 << 20
#: Seconds in which a place has to answer at the start.
PLACE_SECONDS = 8.0
#: Seconds that ``exclusive`` waits for another process.
LOCK_SECONDS = 5.0
#: Settings of the first contact with an object store: the cause of a failure at once, in place of patience.
_IMPATIENT = {"connect_timeout": 2, "read_timeout": 4, "retries": {"total_max_attempts": 1}}
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True, slots=True)
class FileFact:
    """Name of a file, its expected size in bytes and its expected SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class FileMissing(CheckpointError):
    """A file that is to be read does not exist."""


class Storage:
    """The files below ``url``.

    Raises:
        ConfigError: No installed package can read such URLs; the message says what to install.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, root = self._connect()
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._root = str(root).rstrip("/")
        self.written = 0

    def _connect(self, **settings: Any) -> tuple[Any, str]:
        try:
            # No cached listings: another process may have changed the folder.
            fs, root = fsspec.core.url_to_fs(self.url or "/", use_listings_cache=False, **settings)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoints cannot go to {self.url!r}: {error}; for s3:// install torch-ps[s3], else the fsspec "
                "package of that protocol"
            ) from None
        return fs, str(root)

    def place(self, name: str) -> str:
        """Full name of a file, for messages."""
        return f"{self.url}/{name}"

    # -------------------------------------------------------------- first contact

    def try_reading(self) -> None:
        """See whether the place answers.

        Raises:
            CheckpointError: It does not, or refuses; one line with the place and the cause, within ``PLACE_SECONDS``.
        """
        self._answers("read", lambda fs: fs.exists(self._root or "/"))

    def try_writing(self) -> None:
        """Write a small file, read it, and remove it; makes the folder.

        Raises:
            CheckpointError: The place does not answer, or refuses; one line as of ``try_reading``.
        """
        made = self.is_local and not os.path.isdir(self._root)
        name, text = self._path(f"trial-{secrets.token_hex(4)}"), secrets.token_bytes(16)

        def trial(fs: Any) -> None:
            if self.is_local:
                fs.makedirs(self._root, exist_ok=True)
            else:
                fs.exists(self._root)  # says most clearly what is wrong
            fs.pipe_file(name, text)
            try:
                if fs.cat_file(name) != text:
                    raise OSError("what was written there is not what is read")
            finally:
                fs.rm_file(name)

        self._answers("written", trial)
        if made:
            log.info("%s did not exist and has been made", self.url)

    def _answers(self, what: str, call: Callable[[Any], object]) -> None:
        if self.is_local or not self.url.startswith(("s3:", "s3a:")):
            fs = self._fs
        else:
            fs, _ = self._connect(skip_instance_cache=True, config_kwargs=_IMPATIENT)
            fs.retries = 1
        failures: list[Exception] = []

        def run() -> None:
            try:
                call(fs)
            except Exception as error:  # noqa: BLE001  # fsspec's packages raise errors of their own
                failures.append(error)

        thread = threading.Thread(target=run, name="first contact", daemon=True)
        thread.start()
        thread.join(PLACE_SECONDS)
        if thread.is_alive():
            failures.append(TimeoutError(f"no answer within {PLACE_SECONDS:g} s"))
        if failures:
            raise CheckpointError(f"checkpoints cannot be {what} at {self.url}: {cause(failures[0])}")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """In a folder, keep other processes that ask for the same out. Elsewhere, and where locks do not work, nothing.

        Raises:
            CheckpointError: Another process has been in there for ``LOCK_SECONDS``.
        """
        if not self.is_local:
            yield
            return
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise CheckpointError(
                            f"{self.url} is locked by another process, which claims it; start again when that has ended"
                        ) from None
                    time.sleep(0.05)
                    continue
                except OSError as error:
                    log.debug("%s has no locks: %s", self.url, error)
                break
            yield
        finally:
            os.close(descriptor)

    # -------------------------------------------------------------- files

    def write(self, name: str, parts: Iterable[Buffer]) -> FileFact:
        """Write a file; after an error it does not exist.

        Raises:
            OSError: The disk is full, or the file system refuses for another reason.
        """
        digest, size = hashlib.sha256(), 0
        with self._new_local(name) if self.is_local else self._fs.open(self._path(name), "wb") as file:
            for part in parts:
                digest.update(part)
                size += len(part)
                file.write(part)
                self.written += len(part)
        return FileFact(name, size, digest.hexdigest())

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a small file.

        Raises:
            CheckpointError: It is missing, cannot be read, or has more than ``most`` bytes.
        """
        with self._reading(name), self._fs.open(self._path(name), "rb") as file:
            data: bytes = file.read(most + 1)
        if len(data) > most:
            raise CheckpointError(f"{self.place(name)} has more than {most} bytes, so it is no manifest")
        return data

    def check(self, fact: FileFact, *, whole: bool) -> None:
        """Compare a file with its expected size and, if ``whole``, its digest.

        Raises:
            CheckpointError: They differ; the message says how.
        """
        path, place = self._path(fact.name), self.place(fact.name)
        with self._reading(fact.name):
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
        if digest.hexdigest() != fact.sha256:
            raise CheckpointError(f"{place} is damaged: its SHA-256 is not the one that was written down")

    @contextlib.contextmanager
    def local(self, fact: FileFact) -> Iterator[str]:
        """Path of a checked file on this machine, inside the context: itself, or a temporary copy.

        Raises:
            CheckpointError: The file differs from ``fact``; the message says how.
        """
        self.check(fact, whole=True)
        if self.is_local:
            yield self._path(fact.name)
            return
        with tempfile.TemporaryDirectory(prefix="torch-ps-") as folder:
            path = str(Path(folder, "file"))
            with self._reading(fact.name):
                self._fs.get_file(self._path(fact.name), path)
            yield path

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name.

        Raises:
            CheckpointError: The place does not say.
        """
        self._fs.invalidate_cache()
        with self._reading(name):
            return bool(self._fs.exists(self._path(name)))

    def folders(self) -> list[str]:
        """Names of the folders directly below the URL; [] if it does not exist yet.

        Raises:
            CheckpointError: The place does not say.
        """
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001  # fsspec's packages raise errors of their own
            raise CheckpointError(f"{self.url} cannot be read: {cause(error)}") from None
        return sorted(str(each["name"]).rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def rename(self, folder: str, name: str) -> None:
        """Rename a folder, replacing one of that name. In an object store every file is copied."""
        self.remove(name)
        if self.is_local:
            os.rename(self._path(folder), self._path(name))
            return
        for path in self._fs.find(self._path(folder)):
            self._fs.cp_file(path, self._path(name) + str(path).removeprefix(self._path(folder)))
        self.remove(folder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Around reading a file: whatever fsspec raises is a ``CheckpointError`` with its name and one line."""
        place = self.place(name)
        try:
            if self.is_local:
                with contextlib.suppress(FileNotFoundError):
                    kind = _KINDS.get(stat.S_IFMT(os.stat(self._path(name)).st_mode))
                    if kind is not None:
                        raise CheckpointError(f"{place} is no file but {kind}")
            yield
        except CheckpointError:
            raise
        except FileNotFoundError:
            raise FileMissing(f"{place} is missing") from None
        except Exception as error:  # noqa: BLE001  # fsspec's packages raise errors of their own
            raise CheckpointError(f"{place} cannot be read: {cause(error)}") from None

    @contextlib.contextmanager
    def _new_local(self, name: str) -> Iterator[Any]:
        path = Path(self._path(name))
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            part.unlink(missing_ok=True)  # of a writer that died, or a FIFO, which nobody may read
            with part.open("xb", buffering=0) as raw:
                yield _Whole(raw)
                os.fsync(raw.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        for folder in {path.parent, *(each.parent for each in made)}:
            _sync_folder(folder)


def cause(error: BaseException) -> str:
    """One line about an error of a file system or of a package of fsspec."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:500] or type(error).__name__


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
