"""Files and folders that options name for writing are tried before anything starts, not when something is written."""

import tempfile
from pathlib import Path

from torch_ps.common.errors import ConfigError


def check_output(option: str, path: str) -> None:
    """Refuse a file that could not be written; "" is no file.

    Args:
        option: Name of the option, for the message.

    Raises:
        ConfigError: Its folder does not exist or may not be written, or it would replace what is no regular file.
    """
    if not path:
        return
    place = Path(path)
    if place.exists() and not place.is_file():
        raise ConfigError(f"{option} {path} exists and is no regular file; give another one")
    if not place.parent.is_dir():
        raise ConfigError(f"{option} {path} cannot be written: there is no folder {place.parent}; make it first")
    _try(option, path, place.parent)


def check_folder(option: str, path: str) -> None:
    """Make a folder for files, and refuse one that could not be written to.

    Raises:
        ConfigError: It cannot be made or written to; the message says why.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be made: {error.strerror}; give another folder") from None
    _try(option, path, Path(path))


def _try(option: str, path: str, folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}; give another one") from None
