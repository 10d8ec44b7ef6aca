"""Job-wide options: the mode that they make, and how a standby takes them over from its primary.

    ServerConfig --mode_of()--> Mode
    ServerConfig of the primary --dump_options()--> JSON --take_over_options()--> ServerConfig of the standby

Rules of this file
  1. No option is named here because it is job-wide: ``option(..., job_wide=True)`` in its declaration says so.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import declared, job_wide
from torch_ps.common.options.mode_choices import DEFAULT_SLACK
from torch_ps.common.options.parsers import parse_compensation, parse_etcd
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.core.modes import Mode

#: Options that a standby takes over too, being a server of the same shard.
OF_THE_SHARD = ("shard", "lead")
#: Options of which the standby's own value is kept where it differs: how it reaches the lead and the checkpoints.
OWN_IF_GIVEN = ("lead", "checkpoint")


def mode_of(config: ServerConfig, mode: type[Mode] = Mode) -> Mode:
    """The mode that the options of a server choose.

    Args:
        config: options of any server of the job.
        mode: class to make; each of its fields is a job-wide option of ``config`` or made from one here.

    Raises:
        TypeError: a field of ``mode`` is no job-wide option, so servers of one job could differ in it.
    """
    form, strength = parse_compensation(config.delay_compensation)
    values = {name: getattr(config, name) for name in job_wide(type(config))}
    values["name"] = config.mode
    values["slack"] = DEFAULT_SLACK if config.slack is None else config.slack
    values["delay_compensation"] = form
    values["compensation_strength"] = strength or 1.0
    names = [field.name for field in dataclasses.fields(mode)]
    if lacking := set(names) - set(values):
        raise TypeError(f"{mode.__name__}.{min(lacking)} is no job-wide option of {type(config).__name__}")
    return mode(**{name: values[name] for name in names})


def dump_options(config: ServerConfig) -> str:
    """The options that a standby of this server takes over, as JSON; a local checkpoint folder as an absolute path."""
    options = {name: getattr(config, name) for name in _taken_over(config)}
    options["decides"] = _decides(config)
    if config.checkpoint and "://" not in config.checkpoint:
        options["checkpoint"] = os.path.abspath(config.checkpoint)
    return json.dumps(options)


def take_over_options(config: ServerConfig, options: Mapping[str, Any]) -> ServerConfig:
    """Options of a standby: ``config`` with the job-wide values of its primary.

    Args:
        config: options that the standby was started with.
        options: what ``dump_options`` wrote at the primary, decoded.

    Raises:
        ConfigError: the standby was given a value that differs from the primary's; names both.
    """
    fields = declared(type(config))
    taken: dict[str, Any] = {}
    if (decides := options.get("decides")) != _decides(config):
        raise ConfigError(
            f"at the primary at {config.standby_of} {decides} says who serves, here {_decides(config)}; give both the "
            "same --etcd"
        )
    for name in _taken_over(config):
        theirs, mine = options.get(name), getattr(config, name)
        theirs = None if theirs is None and fields[name].optional else fields[name].convert(theirs)
        if mine not in (fields[name].default, theirs) and name not in OWN_IF_GIVEN:
            raise ConfigError(
                f"{name}={mine} is not what the primary at {config.standby_of} has, which is {theirs}; leave it out: a "
                "standby takes it over"
            )
        taken[name] = theirs if mine == fields[name].default else mine
    return dataclasses.replace(config, **taken)


def _taken_over(config: ServerConfig) -> tuple[str, ...]:
    return (*job_wide(type(config)), *OF_THE_SHARD)


def _decides(config: ServerConfig) -> str:
    """What decides which of primary and standby serves; it has to be the same at both."""
    return f"etcd, under the name {parse_etcd(config.etcd).name}" if config.etcd else "the workers"
