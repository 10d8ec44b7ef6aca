"""The table of codecs: which names exist, what may stand behind the colon, and how a user adds one.

    "topk:0.01"  --kind "topk", argument "0.01"-->  Kind  --check, make-->  Codec

Rules of this file
  1. No torch: options are checked here before anything heavy is loaded.
  2. A name that a peer sent makes an object of what is registered here, or is refused; no module is looked for.
  3. Both ends of a job need a codec of the user's: each process imports the modules that ``--codecs`` names.

    class Halves:                                        # my_codecs.py
        name, biased, coarse, sparse = "halves", False, False, False
        def encode(self, values, seed=0): ...
        def check(self, payload, numel): ...
        def decode(self, payload, scratch): ...

    torch_ps.register_codec("halves", lambda argument: Halves())

Source: the registry of codecs in Python's own ``codecs`` module, for the idea.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from torch_ps.common.errors import ConfigError, UnknownCodec
from torch_ps.common.wire.frames import Buffer

if TYPE_CHECKING:
    import torch

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
_ARGUMENT = re.compile(r"[!-~]{0,64}", re.ASCII)


class Codec(Protocol):
    """One way to write fp32 values as bytes. Values are one-dimensional contiguous fp32 CPU tensors.

    Attributes:
        name: as the peer has to look it up, argument included.
        biased: a decoded value is wrong in the mean, so gradients need error feedback.
        coarse: too rough for parameters; a pull sends what the worker's copy lacks instead of the values themselves.
        sparse: most decoded values are 0.
    """

    name: str
    biased: bool
    coarse: bool
    sparse: bool

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        """Write finite ``values``, shape (n,), as parts of a payload; views of it may be among them: join them at once.

        Args:
            values: shape (n,), finite unless the codec is one of none, fp16 and bf16.
            seed: 0 to 2**64 - 1, other for every bucket, step and worker; for codecs that draw lots.
        """

    def check(self, payload: memoryview, numel: int) -> None:
        """Refuse a payload that does not hold ``numel`` values.

        Raises:
            CorruptFrame: says what was expected.
        """

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a checked payload, shape (n,): a read-only view of it where possible, else ``scratch``."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One entry: ``form`` is what a user writes, such as "topk:DENSITY"."""

    form: str
    make: Callable[[str], Codec]
    check: Callable[[str], None]


def register_codec(
    name: str, make: Callable[[str], Codec], *, argument: str = "", check: Callable[[str], None] | None = None
) -> None:
    """Add a codec of one's own, on the server and on every worker (``--codecs MODULE`` imports the module that does).

    Args:
        name: lower-case letters, digits, "-" and "_"; not that of a codec which comes with torch-ps.
        make: builds the codec from what stands behind the colon of its name, "" if nothing does. It is called for names
            that peers send, so an argument that it cannot take has to be refused by ``check``.
        argument: word for that in messages, such as "DENSITY"; empty: the codec takes none.
        check: raises ``ConfigError`` for an argument that cannot be; by default any is taken if ``argument`` names one.

    Raises:
        ConfigError: the name is malformed or taken.
    """
    if not _KIND.fullmatch(name):
        raise ConfigError(f"a codec's name is lower-case letters, digits, '-' and '_', at most 32; got {name!r}")
    if name in _BUILT_IN:
        raise ConfigError(f"codec {name!r} comes with torch-ps; choose another name")
    _KINDS[name] = Kind(
        f"{name}:{argument}" if argument else name, make, check or (_anything if argument else _refuse_argument)
    )
    codec.cache_clear()


def names() -> tuple[str, ...]:
    """The kinds that exist: names without arguments."""
    return tuple(_KINDS)


def forms() -> tuple[str, ...]:
    """What a user may write, for help and errors."""
    return tuple(kind.form for kind in _KINDS.values())


def load(modules: str) -> None:
    """Import the modules that register a user's codecs, "a.b,c"; the working directory is searched too.

    Raises:
        ConfigError: one cannot be imported; says why.
    """
    for module in filter(None, (each.strip() for each in modules.split(","))):
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises is a bad option here
            raise ConfigError(f"codecs: cannot import {module!r}: {type(error).__name__}: {error}") from error


def make_codec(name: str) -> Codec:
    """The codec called ``name``, as a user asked for it.

    Raises:
        ConfigError: lists those that exist, or says what is wrong with the argument.
    """
    check_name(name)
    kind, _, argument = name.partition(":")
    return _KINDS[kind].make(argument)


def check_name(name: str) -> None:
    """What ``make_codec`` refuses, without building the codec.

    Raises:
        ConfigError: as there.
    """
    if name.partition(":")[0] not in _KINDS:
        raise ConfigError(f"codec {name!r} does not exist; choose one of {', '.join(forms())}")
    check_argument(name)


def check_argument(name: str) -> None:
    """Check what stands behind the colon; a kind that is not known (yet) passes.

    Raises:
        ConfigError: says what is wrong.
    """
    kind, colon, argument = name.partition(":")
    if not _ARGUMENT.fullmatch(argument) or (colon and not argument):
        raise ConfigError(f"codec {name!r} has no readable argument; write it as one of {', '.join(forms())}")
    if kind in _KINDS:
        _KINDS[kind].check(argument)


@lru_cache(maxsize=256)
def codec(name: str) -> Codec:
    """The codec called ``name``, as a peer asked for it.

    Raises:
        UnknownCodec: lists those that exist.
    """
    try:
        return make_codec(name)
    except ConfigError as error:
        raise UnknownCodec(str(error)) from None


def density_of(argument: str) -> float:
    """Read the part of the values that a sparse codec sends.

    Raises:
        ConfigError: not above 0 and at most 1.
    """
    try:
        density = float(argument)
    except ValueError:
        density = 0.0
    if not 0 < density <= 1:
        raise ConfigError(
            f"a density must be > 0 and <= 1, as in topk:0.01 for one value in a hundred; got {argument!r}"
        )
    return density


def count(density: float, numel: int) -> int:
    """How many of ``numel`` values a sparse codec sends: no more than its density says, but at least one."""
    return max(1, int(density * numel * (1 + 1e-12)))


def _density(argument: str) -> None:
    density_of(argument)


def _refuse_argument(argument: str) -> None:
    if argument:
        raise ConfigError(f"this codec takes no argument; got {argument!r}; choose one of {', '.join(forms())}")


def _anything(argument: str) -> None:
    pass


def _at_first_use(module: str, name: str, *, density: bool = False) -> Callable[[str], Codec]:
    def make(argument: str) -> Codec:
        found = getattr(importlib.import_module(f"torch_ps.common.codecs.{module}"), name)
        made: Codec = found(argument) if density else found()
        return made

    return make


_KINDS: dict[str, Kind] = {
    "none": Kind("none", _at_first_use("plain", "Plain"), _refuse_argument),
    "fp16": Kind("fp16", _at_first_use("plain", "Fp16"), _refuse_argument),
    "bf16": Kind("bf16", _at_first_use("plain", "Bf16"), _refuse_argument),
    "int8": Kind("int8", _at_first_use("int8", "Int8"), _refuse_argument),
    "sign": Kind("sign", _at_first_use("sign", "Sign"), _refuse_argument),
    "topk": Kind("topk:DENSITY", _at_first_use("topk", "TopK", density=True), _density),
    "randk": Kind("randk:DENSITY", _at_first_use("randk", "RandK", density=True), _density),
}
_BUILT_IN = frozenset(_KINDS)
