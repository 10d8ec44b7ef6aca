"""The registry of codecs: names, arguments behind the colon, and how a user adds a codec.

    "topk:0.01"  --kind "topk", argument "0.01"-->  Kind  --check, make-->  Codec

Rules of this file
  1. No torch at import: options are checked here before anything heavy is loaded.
  2. A name that a peer sent is looked up among the registered codecs or refused; no module is imported for it.
  3. Both ends of a job need a codec of the user: each process imports the modules that ``--codecs`` names.

    class Halves:                                        # my_codecs.py
        name, biased, coarse, sparse = "halves", False, False, False
        def encode(self, values, seed=0): ...
        def check(self, payload, numel): ...
        def decode(self, payload, scratch): ...

    torch_ps.register_codec("halves", lambda argument: Halves())

Source: modelled on the registry of Python's ``codecs`` module, PEP 100.
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
    """A way to write fp32 values as bytes. Values are one-dimensional contiguous fp32 CPU tensors.

    Attributes:
        name: name under which the peer looks the codec up, argument included.
        biased: True if the mean error of a decoded value is not 0, so that gradients need error feedback.
        coarse: True if the error is too large for parameters; a pull then sends differences from the worker's copy.
        sparse: True if most decoded values are 0.
    """

    name: str
    biased: bool
    coarse: bool
    sparse: bool

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[Buffer, ...]:
        """Encode ``values`` as parts of a payload. Parts may be views of ``values``: join them before it changes.

        Args:
            values: shape (n,), finite unless the codec is one of none, fp16 and bf16.
            seed: seed of a codec that draws at random, 0 to 2**64 - 1; differs for every bucket, step and worker.
        """

    def check(self, payload: memoryview, numel: int) -> None:
        """Refuse a payload that does not hold ``numel`` values.

        Raises:
            CorruptFrame: the payload is malformed; says what was expected.
        """

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        """Decode a checked payload: a read-only view of it where possible, else ``scratch``, shape (n,), filled."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One entry of the registry: ``form`` shows users how to write the name, such as "topk:DENSITY"."""

    form: str
    make: Callable[[str], Codec]
    check: Callable[[str], None]


def register_codec(
    name: str, make: Callable[[str], Codec], *, argument: str = "", check: Callable[[str], None] | None = None
) -> None:
    """Register a codec; do so on the servers and on every worker (``--codecs MODULE`` imports a module that does).

    Args:
        name: lower-case letters, digits, "-" and "_", at most 32; not the name of a codec that comes with torch-ps.
        make: factory that takes the text behind the colon of the name, "" without one. It is called for names that
            peers send, so ``check`` has to refuse every argument that it cannot take.
        argument: placeholder of the argument in messages, such as "DENSITY"; empty if the codec takes none.
        check: function that raises ``ConfigError`` for a bad argument; without one every argument is accepted if
            ``argument`` is given, and none otherwise.

    Raises:
        ConfigError: the name is malformed, or that of a codec that comes with torch-ps.
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
    """Names of the registered codecs, without arguments."""
    return tuple(_KINDS)


def forms() -> tuple[str, ...]:
    """How users write the registered codecs, for help and errors, such as "topk:DENSITY"."""
    return tuple(kind.form for kind in _KINDS.values())


def load(modules: str) -> None:
    """Import the modules that register codecs of users, "a.b,c"; the working directory is searched too.

    Raises:
        ConfigError: a module cannot be imported; says why.
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
    """Make the codec that a user named.

    Raises:
        ConfigError: the codec does not exist, and those that do are listed; or its argument is bad.
    """
    check_name(name)
    kind, _, argument = name.partition(":")
    return _KINDS[kind].make(argument)


def check_name(name: str) -> None:
    """Refuse what ``make_codec`` refuses, without making the codec.

    Raises:
        ConfigError: the same as that of ``make_codec``.
    """
    if name.partition(":")[0] not in _KINDS:
        raise ConfigError(f"codec {name!r} does not exist; choose one of {', '.join(forms())}")
    check_argument(name)


def check_argument(name: str) -> None:
    """Check the argument behind the colon; a name that is not registered (yet) passes.

    Raises:
        ConfigError: the argument is bad; says why.
    """
    kind, colon, argument = name.partition(":")
    if not _ARGUMENT.fullmatch(argument) or (colon and not argument):
        raise ConfigError(f"codec {name!r} has no readable argument; write it as one of {', '.join(forms())}")
    if kind in _KINDS:
        _KINDS[kind].check(argument)


@lru_cache(maxsize=256)
def codec(name: str) -> Codec:
    """The codec that a peer named; cached.

    Raises:
        UnknownCodec: the codec does not exist, or its argument is bad.
    """
    try:
        return make_codec(name)
    except ConfigError as error:
        raise UnknownCodec(str(error)) from None


def density_of(argument: str) -> float:
    """Parse the share of the values that a sparse codec sends.

    Raises:
        ConfigError: the share is not > 0 and <= 1.
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
    """Number of the ``numel`` values that a sparse codec sends: density * numel rounded down, at least 1."""
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
