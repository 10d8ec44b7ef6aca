"""Options on the command line: one decorator per config class.

    @click.command(cls=Command)
    @options_of(ServerConfig)
    def main(server: ServerConfig) -> None: ...

Rules of this file
  1. For each option, a flag beats an environment variable, which beats the TOML file (``--config``), which beats the
     default.
  2. Every value is checked before the command's code runs. A refused one is a usage error, exit code 2, whose message
     says where the value came from unless it was a flag.
  3. Several config classes on one command share the fields that they declare identically.

In a TOML file an option stands at the top level or in the table of its config class (``[server]``, ``[worker]``);
the table wins. One file and one environment can describe a whole job: what is for other commands is let through, what
no command knows is refused (``every_option.py``).

Source: https://click.palletsprojects.com/ parses argv and lays out the help.
"""

import errno
import functools
import logging
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click

from torch_ps.common import standard_streams
from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.every_option import check_keys, check_table, check_variables
from torch_ps.common.options.fields import (
    Check,
    Field,
    arguments_of,
    at_least,
    check_all,
    declared,
    environment_of,
    more_than,
    option,
    table_of,
    within,
)

__all__ = [
    "Check",
    "Command",
    "arguments_of",
    "at_least",
    "check_all",
    "environment_of",
    "more_than",
    "option",
    "options_of",
    "within",
]

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("torch_ps")

_FILE = "torch_ps.config_file"


def options_of(
    config: type[Any], *, prefix: str = "PS", only: Collection[str] | None = None, exclude: Collection[str] = ()
) -> Callable[[F], F]:
    """Decorate a click command with the options of ``config``.

    The command receives the frozen object as an argument named after the class: ``server`` for ``ServerConfig``.

    Args:
        config: frozen dataclass whose fields were made by ``option``.
        prefix: first part of the names of environment variables, as in ``PREFIX_FIELD``.
        only: names of the fields to offer; all if None.
        exclude: names of the fields not to offer; they keep their defaults.

    Raises:
        TypeError: a name in ``only`` or ``exclude`` is unknown, or two stacked classes declare one name differently.
    """
    known = declared(config)
    if unknown := {*(only or ()), *exclude} - set(known):
        raise TypeError(f"{config.__name__} has no option {', '.join(sorted(unknown))}")
    chosen = {n: f for n, f in known.items() if (only is None or n in only) and n not in exclude}
    table = table_of(config)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            context = click.get_current_context()
            for name in (*chosen, "config"):
                kwargs.pop(name, None)
            try:
                kwargs[table] = _build(config, chosen, context, prefix, table)
            except ConfigError as error:
                raise Refusal(str(error)) from None
            return function(*args, **kwargs)

        _add(command, chosen, table, prefix)
        return command  # type: ignore[return-value]

    return decorate


class Refusal(click.ClickException):
    """A refused value or combination of values: its sentence alone, without the usage, which would not help."""

    exit_code = 2


class FieldOption(click.Option):
    """A click option for one field. It passes text on: the field converts and checks it."""

    def __init__(self, field: Field, prefix: str, tables: set[str]) -> None:
        names = [field.name, field.flag + ("/--no-" + field.flag[2:] if field.kind is bool else "")]
        super().__init__(
            [*names, field.short] if field.short else names,
            type=bool if field.kind is bool else str,
            multiple=field.kind is tuple,
            default=None,
            metavar=metavar_of(field),
        )
        self.field, self.prefix, self.tables = field, prefix, tables

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return help_of(self.field)


class Command(click.Command):
    """A click command whose help fits a screen and whose errors are one sentence.

    ``--help`` lists the options declared as common, ``--help-all`` every one. ``ConfigError`` ends in exit code 2,
    any other ``PsError`` in 1, and so does an error of the system, such as a full disk; all print the sentence and no
    traceback (that of the system's error is logged at level debug). A reader that goes, as ``head`` does, is no error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {"max_content_width": 100} | (kwargs.get("context_settings") or {})
        super().__init__(*args, **kwargs)
        # click's mark for "leave these lines as they are" is a backspace, which a raw docstring cannot hold.
        self.help = self.help and self.help.replace("\\b\n", "\b\n")
        if any(not shown_first(each) for each in self.params):
            self.params.append(
                click.Option(
                    ["--help-all"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=_help_all,
                    help="show every option",
                )
            )

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standard_streams.open_closed()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with standard_streams.quiet_without_reader():
                return super().invoke(ctx)
        except ConfigError as error:
            raise Refusal(str(error)) from None
        except PsError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            log.debug("an error of the system ends %s", ctx.info_name, exc_info=error)
            raise click.ClickException(words_of(error)) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        everything = bool(ctx.meta.get("torch_ps.help_all"))
        params = [each for each in self.get_params(ctx) if not isinstance(each, click.Argument)]
        rows = [each.get_help_record(ctx) for each in params if shown_first(each)]
        more = [each.get_help_record(ctx) for each in params if not shown_first(each)]
        for title, part in (("Options", rows), ("More options", more if everything else [])):
            if records := [row for row in part if row is not None]:
                with formatter.section(title):
                    formatter.write_dl(records)
        prefixes = {each.prefix for each in params if isinstance(each, FieldOption)}
        if prefixes:
            formatter.write_paragraph()
            formatter.write_text(
                f"--some-option is also ${prefixes.pop()}_SOME_OPTION and some_option in the TOML file of --config; "
                "a flag beats a variable, a variable the file."
            )


def words_of(error: OSError) -> str:
    """One line about an error of the system: what it is about, what it is and, for some, what to do."""
    about = f"{error.filename}: " if error.filename is not None else ""
    advice = {
        errno.EMFILE: "; this process may open no more files: raise the limit with ulimit -n",
        errno.ENFILE: "; this machine may open no more files: end other processes, or raise fs.file-max",
        errno.ENOSPC: "; make room there",
        errno.EROFS: "; give a place that can be written",
    }
    return f"{about}{error.strerror or error}{advice.get(error.errno or 0, '')}"


def shown_first(param: click.Parameter) -> bool:
    return not isinstance(param, FieldOption) or param.field.common


def metavar_of(field: Field) -> str:
    if field.metavar or field.choices is not None:
        return field.metavar or "|".join(field.allowed())
    if field.unit and " " not in field.unit:
        return field.unit.upper()
    return "|".join([{int: "N", float: "NUMBER"}.get(field.kind, "TEXT"), *field.words])


def help_of(field: Field) -> tuple[str, str]:
    """The flag column and the text column of one line of help."""
    flags = ", ".join(each for each in (field.short, field.flag) if each)
    if field.kind is not bool:
        flags += " " + metavar_of(field)
    facts = [field.help]
    if field.kind in (int, float) and (limits := [check.says for check in field.checks]):
        facts.append("; " + ", ".join(limits))
    if field.default not in (None, "", False, ()):
        facts.append(f"  [{field.default:g}]" if field.kind is float else f"  [{field.default}]")
    if field.env:
        facts.append("  (or " + ", ".join(f"${name}" for name in field.env) + ")")
    return flags, "".join(facts)


def _add(command: Callable[..., Any], chosen: dict[str, Field], table: str, prefix: str) -> None:
    params: list[click.Parameter] = command.__dict__.setdefault("__click_params__", [])
    present = {each.name: each for each in params}
    # click reverses this list when it makes the command, as decorators are applied from the last to the first.
    for name, field in reversed(chosen.items()):
        other = present.get(name)
        if other is None:
            params.append(FieldOption(field, prefix, {table}))
        elif isinstance(other, FieldOption) and other.field == field:
            other.tables.add(table)
        else:
            raise TypeError(f"option {name} is declared twice and differently; leave one out with exclude")
    if "config" not in present:
        help_text = f"TOML file with options  (or ${prefix}_CONFIG)"
        file = click.Path(exists=True, dir_okay=False)
        params.insert(
            0, click.Option(["--config"], type=file, metavar="FILE", envvar=f"{prefix}_CONFIG", help=help_text)
        )


def _build(config: type[Any], chosen: Mapping[str, Field], context: click.Context, prefix: str, table: str) -> Any:
    file = _read_file(context)
    values: dict[str, Any] = {}
    for name, field in chosen.items():
        flag = context.params.get(name)
        variable = next((each for each in field.variables(prefix) if os.environ.get(each)), None)
        if flag is not None and flag != ():
            values[name] = field.convert(flag)
        elif variable is not None:
            values[name] = _convert(field, os.environ[variable], f"${variable}")
        else:
            for part in (file.get(table, {}), file):
                if name in part:
                    values[name] = _convert(field, part[name], context.params["config"])
                    break
    return config(**values)


def _convert(field: Field, given: Any, source: str) -> Any:
    try:
        return field.convert(given)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {source})") from None


def _read_file(context: click.Context) -> dict[str, Any]:
    """The TOML file of this call, {} if there is none; its names and those of the variables have been checked."""
    if _FILE not in context.meta:
        path = context.params.get("config")
        try:
            context.meta[_FILE] = {} if path is None else _parse_file(path)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} is not a readable TOML file: {error}") from None
        _check_names(context.meta[_FILE], context)
    file: dict[str, Any] = context.meta[_FILE]
    return file


def _parse_file(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8-sig") as stream:  # some editors begin a file with a byte-order mark
        return tomllib.loads(stream.read())


def _check_names(file: Mapping[str, Any], context: click.Context) -> None:
    """Refuse variables, and tables and keys of the file, that no command knows."""
    fields = [each for each in context.command.params if isinstance(each, FieldOption)]
    check_variables(os.environ, (name for each in fields for name in each.field.variables(each.prefix)))
    own: dict[str, list[str]] = {}
    for each in fields:
        for table in each.tables:
            own.setdefault(table, []).append(each.field.name)
    path, program = context.params["config"], str(context.info_name)
    check_keys(
        "", [key for key in file if not isinstance(file[key], dict)], [f.field.name for f in fields], program, path
    )
    for key, value in file.items():
        if key in own and isinstance(value, dict):
            check_keys(key, value, own[key], program, path)
        elif isinstance(value, dict):
            check_table(key, value, path)


def _help_all(context: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.meta["torch_ps.help_all"] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()
