"""Parsers of option values that have a syntax of their own.

--shard I/N    --delay-compensation FORM[:STRENGTH]    --etcd URL[,URL...]
"""

import math
import re
import urllib.parse
from typing import NamedTuple

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.mode_choices import COMPENSATION_STRENGTHS

_SHARD = re.compile(r"([0-9]{1,4})/([0-9]{1,4})", re.ASCII)


def parse_shard(text: str) -> tuple[int, int]:
    """Read "I/N" as (I, N), shard I of N counted from 0; "" is the only shard, (0, 1).

    Raises:
        ConfigError: the text is not of that form, or I is not below N.
    """
    match = _SHARD.fullmatch(text or "0/1")
    if match is None:
        raise ConfigError(f"a shard must be I/N, such as 0/2 for the first of two; got {text!r}")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        raise ConfigError(f"a shard must be I/N with I below N, counted from 0; got {text!r}")
    return index, count


def parse_compensation(text: str) -> tuple[str, float]:
    """Read "FORM", "FORM:STRENGTH" or "STRENGTH" as (form, strength); "1.5" is "constant:1.5", "off" has strength 0.

    Raises:
        ConfigError: the text is not of that form, or the strength is not above 0.
    """
    if text == "off":
        return "off", 0.0
    form, colon, number = text.partition(":")
    if form not in COMPENSATION_STRENGTHS and not colon:
        form, colon, number = "constant", ":", text
    try:
        strength = float(number) if colon else COMPENSATION_STRENGTHS[form]
    except (KeyError, ValueError):
        strength = 0.0
    if form not in COMPENSATION_STRENGTHS or not (strength > 0 and math.isfinite(strength)):
        raise ConfigError(
            "a delay compensation must be off, constant, adaptive, or one of these with a strength above 0, as in "
            f"adaptive:2; got {text!r}"
        )
    return form, strength


class Etcd(NamedTuple):
    """Access to an etcd cluster: addresses without user and path, user, password, and the name of the job there."""

    urls: tuple[str, ...]
    user: str
    password: str
    name: str


def parse_etcd(text: str) -> Etcd:
    """Read the value of ``--etcd``.

    Raises:
        ConfigError: the text is not of that form.
    """
    urls, user, password, name = [], "", "", ""
    for each in text.split(","):
        try:
            parts = urllib.parse.urlsplit(each.strip())
            wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port is None
        except ValueError:
            wrong = True
        if wrong or parts.query or parts.fragment:
            raise ConfigError(
                "etcd must be http://HOST:PORT or https://HOST:PORT, with a user (USER:PASSWORD@) and a name of the "
                "job (/NAME) if you like, several with commas between them"
            )
        urls.append(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
        user, password = urllib.parse.unquote(parts.username or user), urllib.parse.unquote(parts.password or password)
        name = parts.path.strip("/") or name
    return Etcd(tuple(urls), user, password, name or "torch-ps")
