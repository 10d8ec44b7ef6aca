"""The token of a job: a secret in a file that a worker sends with every call.

    token file --read--> TokenFile --metadata--> "authorization: Bearer ..." of a client
      (one token per line)        --accepts--> a server's check of that header, in constant time

Rules of this file
  1. No message, log line or ``repr`` holds a token; errors name the file.
  2. The file is read again when it has changed. If its new content is bad, the old tokens stay valid, and the log says
     so once.

A server accepts the token of every line, a client sends that of the first. To change the token without
interruption, put the new one above the old one on the servers, then on the workers, and delete the old line last.

Source: RFC 6750, section 2.1, for the header and the characters of a token.
"""

import hmac
import logging
import re
from pathlib import Path

from torch_ps.common.errors import ConfigError
from torch_ps.common.security.watched_files import WatchedFiles

log = logging.getLogger("torch_ps")

#: Least and most characters of a token: a shorter one could be guessed, a longer one exceeds a call's metadata.
MIN_LENGTH, MAX_LENGTH = 16, 1024
MAX_TOKENS = 8
HEADER = "authorization"
_SCHEME = "Bearer "
_FORM = re.compile(r"[A-Za-z0-9._~+/=-]+", re.ASCII)

Metadata = tuple[tuple[str, str], ...]


class TokenFile:
    """The tokens in a file, as it is now.

    Raises:
        ConfigError: the file cannot be read, has no token, or has a malformed one.
    """

    def __init__(self, path: str) -> None:
        self._file = WatchedFiles({"token_file": path}, lambda contents: _tokens(path, contents[0]))

    def __repr__(self) -> str:
        return f"TokenFile({self._file.paths[0]!r})"

    @property
    def metadata(self) -> Metadata:
        """Metadata that a client sends with a call."""
        return ((HEADER, _SCHEME + self._file.value[0]),)

    def accepts(self, shown: str) -> bool:
        """Whether the value of an authorization header is one of the tokens; equally fast for all wrong ones."""
        given = shown.encode()
        good = [hmac.compare_digest(given, (_SCHEME + token).encode()) for token in self._file.value]
        return any(good)


def _tokens(path: str, content: bytes) -> tuple[str, ...]:
    try:
        lines = content.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"token file {path} holds bytes that are not ASCII") from None
    tokens = tuple(line.strip() for line in lines if line.strip())
    if not tokens:
        raise ConfigError(f"token file {path} is empty; {_advice(path)}")
    if len(tokens) > MAX_TOKENS:
        raise ConfigError(
            f"token file {path} has {len(tokens)} lines; at most {MAX_TOKENS} tokens, one per line, are allowed"
        )
    for number, token in enumerate(tokens, 1):
        if not MIN_LENGTH <= len(token) <= MAX_LENGTH:
            raise ConfigError(
                f"token {number} in {path} has {len(token)} characters; {MIN_LENGTH} to {MAX_LENGTH} are needed; "
                f"{_advice(path)}"
            )
        if not _FORM.fullmatch(token):
            raise ConfigError(f"token {number} in {path} has a character other than letters, digits and . _ ~ + / = -")
    return tokens


def _advice(path: str) -> str:
    return f"make one with: openssl rand -hex 32 > {Path(path).name}"
