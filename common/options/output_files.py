"""Files that options name for writing are tried before anything starts, not when there is something to write."""

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
    try:
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}; give another one") from None
