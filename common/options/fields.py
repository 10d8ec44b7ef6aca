"""Options as fields of frozen dataclasses: name, type, default, check, unit and help in one declaration.

Rules of this file
  1. An option is a field made by ``option(...)``; there is no other declaration.
  2. A check is a predicate and the words that complete "must be ...", so help and error say the same.
  3. No click and no I/O: ``command_line.py`` makes the command line, this file parses and checks values.

    class field --declared()--> Field --convert()--> value --check()--> frozen config object
                                      <--environment_of() / arguments_of()-- for child processes

Source: metadata of ``dataclasses.field``, PEP 557.
"""

import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from torch_ps.common.errors import ConfigError

C = TypeVar("C")
Choices = Callable[[], Iterable[str]] | Iterable[str]


@dataclass(frozen=True, slots=True)
class Check:
    """A predicate, and in ``says`` the words that complete "lease must be ...", before the unit.

    A predicate may also raise ``ConfigError`` with a reason of its own.
    """

    says: str
    accepts: Callable[[Any], bool] = field(compare=False)


def more_than(low: float) -> Check:
    return Check(f"> {low:g}", lambda value: math.isfinite(value) and value > low)


def at_least(low: float) -> Check:
    return Check(f">= {low:g}", lambda value: math.isfinite(value) and value >= low)


def within(low: float, high: float) -> Check:
    """``low <= value <= high``."""
    return Check(f"between {low:g} and {high:g}", lambda value: low <= value <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """An option as declared, with the name and type of its dataclass field; see ``option`` for the other attributes.

    Attributes:
        kind: str, int, float, bool, or tuple for several texts (a flag that may be repeated).
        optional: whether None is allowed.
        words: texts that are allowed instead of a number: an ``int | Literal["auto"]`` is 64, "64" or "auto".
    """

    name: str
    kind: type
    optional: bool
    words: tuple[str, ...]
    default: Any
    help: str
    unit: str
    choices: Choices | None
    checks: tuple[Check, ...]
    metavar: str
    env: tuple[str, ...]
    short: str
    common: bool
    job_wide: bool
    per_process: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def variables(self, prefix: str) -> tuple[str, ...]:
        """Environment variables that set this option; the first that is set wins."""
        return (f"{prefix}_{self.name.upper()}", *self.env)

    def allowed(self) -> tuple[str, ...]:
        """The choices, or () where any value of the kind is possible."""
        if self.choices is None:
            return ()
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def check(self, value: Any) -> Any:
        """Return ``value`` if it has the right type and passes every check.

        Raises:
            ConfigError: the value is refused; names the option and the value.
        """
        if value is None and self.optional:
            return None
        if isinstance(value, str) and value in self.words:
            return value
        if not _is(self.kind, value):
            raise self._refused(self._kind_in_words(), value)
        allowed = self.allowed()
        if allowed and value not in allowed:
            raise self._refused("one of " + ", ".join(allowed), value)
        for check in self.checks:
            try:
                accepted = check.accepts(value)
            except ConfigError as error:
                raise ConfigError(f"{self.name}: {error}") from None
            if not accepted:
                raise self._refused(f"{check.says} {self.unit}".rstrip(), value)
        return value

    def convert(self, given: Any) -> Any:
        """Convert a value from a flag, a variable or a TOML file to the field's type, and check it.

        Text is parsed, so ``lease = "5"`` in a TOML file works too; numbers and booleans are taken as they are.

        Raises:
            ConfigError: the value cannot be converted to the field's type, or fails a check.
        """
        value = given
        try:
            if self.kind is tuple:
                value = _items(given)
            elif self.kind is bool and isinstance(given, str):
                value = _TRUTH[given.strip().lower()]
            elif self.kind in (int, float) and isinstance(given, str):
                value = given.strip() if given.strip() in self.words else self.kind(given.strip())
            elif self.kind is float and type(given) is int:
                value = float(given)
        except (ValueError, KeyError):
            raise self._refused(self._kind_in_words(), given) from None
        return self.check(value)

    def text(self, value: Any) -> str:
        """Text of a value for a variable or a flag; the inverse of ``convert``."""
        if self.kind is bool:
            return "1" if value else "0"
        return ",".join(value) if self.kind is tuple else str(value)

    def _kind_in_words(self) -> str:
        return " or ".join([_WORDS[self.kind], *self.words])

    def _refused(self, what: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.name} must be {what}; got {value!r}")


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Choices | None = None,
    check: Check | tuple[Check, ...] = (),
    metavar: str = "",
    env: str | tuple[str, ...] = (),
    short: str = "",
    common: bool = False,
    job_wide: bool = False,
    per_process: bool = False,
) -> Any:
    """Declare one option as a field of a frozen dataclass.

    Args:
        default: value when nothing sets it; the field's annotation is the type.
        help: meaning of the option in half a line; type, default and range are added to it.
        unit: plural noun behind a number, such as "seconds".
        choices: allowed values, or a function that returns them when they are needed.
        check: one or several checks of a value.
        metavar: placeholder of the value in the help; made from choices, unit or type if empty.
        env: further environment variables, read after ``$PS_NAME``.
        short: one-letter flag, such as "-n".
        common: whether ``--help`` shows the option; ``--help-all`` shows every one.
        job_wide: whether the value is the same on every server of a job; a standby takes it over from its primary.
        per_process: whether a launcher chooses the value for each process that it starts; ps-run has no such option.
    """
    facts = {
        "help": help,
        "unit": unit,
        "choices": choices,
        "checks": check if isinstance(check, tuple) else (check,),
        "metavar": metavar,
        "env": env if isinstance(env, tuple) else (env,),
        "short": short,
        "common": common,
        "job_wide": job_wide,
        "per_process": per_process,
    }
    return field(default=default, metadata={"option": facts})


def declared(config: type[Any]) -> Mapping[str, Field]:
    """The options of a config class by name, in the order of their declaration."""
    hints = typing.get_type_hints(config)
    found: dict[str, Field] = {}
    for each in fields(config):
        if "option" in each.metadata:
            kind, optional, words = _kind(hints[each.name])
            facts = each.metadata["option"]
            found[each.name] = Field(
                name=each.name, kind=kind, optional=optional, words=words, default=each.default, **facts
            )
    return found


def job_wide(config: type[Any]) -> tuple[str, ...]:
    """Names of the options that are the same on every server of a job, in the order of their declaration."""
    return tuple(name for name, each in declared(config).items() if each.job_wide)


def per_process(config: type[Any]) -> tuple[str, ...]:
    """Names of the options that a launcher chooses for each process, in the order of their declaration."""
    return tuple(name for name, each in declared(config).items() if each.per_process)


def check_all(config: Any) -> None:
    """Check every field of a config object; called first in its ``__post_init__``.

    Raises:
        ConfigError: a value is refused; names the option and the value.
    """
    for name, each in declared(type(config)).items():
        each.check(getattr(config, name))


def table_of(config: type[Any]) -> str:
    """Name of a config class in TOML files and as an argument: ``ServerConfig`` is "server"."""
    return config.__name__.removesuffix("Config").lower()


def environment_of(config: Any, base: Mapping[str, str], *, prefix: str = "PS") -> dict[str, str]:
    """Environment variables for a child process from which it reads exactly ``config``.

    They are ``base`` without the variables of this config class and without ``$PS_CONFIG``, which the parent has read
    already, and with every value that differs from its default.
    """
    known = declared(type(config))
    dropped = {f"{prefix}_CONFIG", *(name for each in known.values() for name in each.variables(prefix))}
    environment = {name: value for name, value in base.items() if name not in dropped}
    for name, each in known.items():
        if (value := getattr(config, name)) != each.default:
            environment[each.variables(prefix)[0]] = each.text(value)
    return environment


def from_environment(config: type[C], environment: Mapping[str, str], *, prefix: str = "PS") -> C:
    """Read a config from environment variables; the inverse of ``environment_of``.

    Raises:
        ConfigError: a value is refused; names the variable.
    """
    values: dict[str, Any] = {}
    for name, each in declared(config).items():
        variable = next((v for v in each.variables(prefix) if environment.get(v)), None)
        if variable is not None:
            try:
                values[name] = each.convert(environment[variable])
            except ConfigError as error:
                raise ConfigError(f"${variable}: {error}") from None
    return config(**values)


def arguments_of(config: Any) -> list[str]:
    """Flags for the values of ``config`` that differ from their defaults, for people to read and repeat.

    Start child processes with ``environment_of``, which inherited variables cannot override.
    """
    flags: list[str] = []
    for name, each in declared(type(config)).items():
        value = getattr(config, name)
        if value == each.default:
            continue
        if each.kind is bool:
            flags.append(each.flag if value else each.flag.replace("--", "--no-", 1))
        elif each.kind is tuple:
            flags += [f"{each.flag}={item}" for item in value]
        else:
            flags.append(f"{each.flag}={each.text(value)}")
    return flags


_WORDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
}
_TRUTH = {
    word: truth for truth, words in ((True, "1 true yes on"), (False, "0 false no off")) for word in words.split()
}


def _is(kind: type, value: Any) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if kind is float and isinstance(value, float | int):
        return not isinstance(value, bool) and not math.isnan(value)
    return type(value) is kind


def _items(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return tuple(item.strip() for item in given.split(",") if item.strip())
    if isinstance(given, list | tuple) and all(isinstance(item, str) for item in given):
        return tuple(given)
    raise ValueError(given)


def _kind(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """The plain type behind an annotation, whether None is allowed, and the words that are.

    ``int | None`` is (int, True, ()), ``int | Literal["auto"]`` is (int, False, ("auto",)).
    """
    several = typing.get_origin(hint) in (types.UnionType, typing.Union)
    given = typing.get_args(hint) if several else (hint,)
    words = tuple(word for each in given if typing.get_origin(each) is typing.Literal for word in typing.get_args(each))
    plain = [each for each in given if each is not types.NoneType and typing.get_origin(each) is not typing.Literal]
    if len(plain) != 1:
        raise TypeError(f"an option has one type, and beside it None or literal words; got {hint}")
    kind = typing.get_origin(plain[0]) or plain[0]
    if kind not in _WORDS or (words and kind not in (int, float)):
        names = ", ".join(each.__name__ for each in _WORDS)
        raise TypeError(f"an option is one of {names}, and a number may have literal words beside it; got {hint}")
    return kind, types.NoneType in given, words
