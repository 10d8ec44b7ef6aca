"""The options of all commands together: a variable, table or key that belongs to none of them is a slip, and refused.

One environment and one TOML file describe a whole job, so each command finds names there that are for others. It knows
them all; what nobody knows would otherwise be ignored, and the job would run with a default in its place.

Rules of this file
  1. Variables begin with "PS_". Those that other programs make with the same beginning are let through: Kubernetes
     makes some for each Service (``PS_PORT_80_TCP_ADDR``), and procps reads some (``PS_FORMAT``).
  2. An empty variable counts as not set, as everywhere.

Source: https://kubernetes.io/docs/tutorials/services/connect-applications-service/ for the variables of a Service;
ps(1), section "Environment variables".
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.common.options.export_config import ExportConfig
from torch_ps.common.options.fields import declared, table_of
from torch_ps.common.options.run_config import RunConfig
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.status_config import StatusConfig
from torch_ps.common.options.worker_config import WorkerConfig

#: Config classes by the command that reads the table of their name.
OF_COMMAND: dict[str, type[Any]] = {
    "ps-serve": ServerConfig,
    "ps-worker": WorkerConfig,
    "ps-run": RunConfig,
    "ps-compare": CompareConfig,
    "ps-status": StatusConfig,
    "ps-export": ExportConfig,
}
#: Tables that a TOML file may have.
TABLES = tuple(table_of(each) for each in OF_COMMAND.values())
PREFIX = "PS_"
#: Variables that are no options: the file of options, the pipe of ``parent_death.py``, the folder of the Slurm script.
NO_OPTIONS = ("PS_CONFIG", "PS_LIFELINE", "PS_FOLDER")

#: Variables of procps.
_PROCPS = {"PS_COLORS", "PS_FORMAT", "PS_PERSONALITY", "PS_SYSMAP", "PS_SYSTEM_MAP"}
_OF_SERVICE = re.compile(
    r"(?P<service>PS(_\w+?)?)_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)",
    re.ASCII,
)


def check_variables(environment: Mapping[str, str], own: Iterable[str] = ()) -> None:
    """Refuse variables that look like options of torch-ps and are none.

    Args:
        environment: Variables of this process.
        own: Further names that the caller knows.

    Raises:
        ConfigError: Some are unknown; names each, and the nearest one that exists.
    """
    found = [name for name, value in environment.items() if value and name.startswith(PREFIX)]
    if not found:
        return
    options = (each for config in OF_COMMAND.values() for each in declared(config).values())
    known = {*NO_OPTIONS, *own, *(name for each in options for name in each.variables(PREFIX[:-1]))}
    slips = []
    for name in sorted(found):
        if name not in known and not _of_other_programs(name, environment):
            near = nearest(name, [each for each in known if each.startswith(PREFIX)])
            hint = f"did you mean ${near}?" if near else "unset it, or rename it if it is not for torch-ps"
            slips.append(f"${name} is no option of torch-ps; {hint}")
    if slips:
        raise ConfigError(" ".join(slips))


def _of_other_programs(name: str, environment: Mapping[str, str]) -> bool:
    match = _OF_SERVICE.fullmatch(name)
    return name in _PROCPS or (match is not None and f"{match['service']}_SERVICE_HOST" in environment)


def check_table(table: str, names: Iterable[str], path: str) -> None:
    """Refuse a table of a TOML file that no command has, or a name in it that its command has not.

    Raises:
        ConfigError: It is unknown; names the file, and the nearest one that exists.
    """
    if table not in TABLES:
        near = nearest(table, TABLES)
        hint = f"; did you mean [{near}]?" if near else ""
        raise ConfigError(f"[{table}] in {path} must be one of {', '.join(f'[{each}]' for each in TABLES)}{hint}")
    program, config = next(item for item in OF_COMMAND.items() if table_of(item[1]) == table)
    check_keys(table, names, declared(config), program, path)


def check_keys(table: str, names: Iterable[str], known: Collection[str], program: str, path: str) -> None:
    """Refuse a name that is none of the ``known`` options of ``program``; ``table`` is "" at the top of the file.

    Raises:
        ConfigError: It is unknown; names the file, and the nearest one that exists.
    """
    for name in names:
        if name not in known:
            near = nearest(name, known)
            where = f"{name} of [{table}]" if table else name
            raise ConfigError(
                f"{where} in {path} is not an option of {program}" + (f"; did you mean {near}?" if near else "")
            )


def nearest(name: str, known: Collection[str]) -> str:
    """The known name that is most alike; "" if none is."""
    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), "")
