"""Several models on one command line: ``--models 2`` or ``--models gen,critic``, a job of its own for each.

    ServerConfig with models --options_of_model()--> ServerConfig of one job

A model's checkpoints are in the folder of its name, its trace and its etcd key bear it, and so do its log lines.
"""

import dataclasses
from pathlib import PurePath

from torch_ps.common.options.parsers import parse_etcd
from torch_ps.common.options.server_config import ServerConfig, names_of_models
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address

__all__ = ["names_of_models", "options_of_model", "shift_data_port", "shift_port"]


def shift_port(text: str, ports: int) -> str:
    """Shift the port of an address by ``ports``; port 0, any free one, stays."""
    first = address.parse(text, free_port=True)
    return str(Address(first.host, first.port and first.port + ports))


def shift_data_port(text: str, ports: int) -> str:
    """Shift a data port by ``ports``; 0, any free one, and off stay."""
    return text if text in ("0", "off") else str(int(text) + ports)


def options_of_model(config: ServerConfig, index: int) -> ServerConfig:
    """Options of the servers of one model.

    Args:
        config: options of all models.
        index: place of the model in ``config.models``, from 0.
    """
    name = names_of_models(config.models)[index]
    ports = index * config.shards
    return dataclasses.replace(
        config,
        models="",
        job=name,
        listen=shift_port(config.listen, ports),
        data_port=shift_data_port(config.data_port, ports),
        metrics=config.metrics if config.metrics == "off" else shift_port(config.metrics, ports),
        checkpoint=f"{config.checkpoint.rstrip('/')}/{name}" if config.checkpoint else "",
        trace=_file_of(config.trace, name),
        etcd=_key_of(config.etcd, name),
    )


def _file_of(path: str, name: str) -> str:
    """A file of one model beside that of all: trace.json becomes trace-gen.json."""
    if not path:
        return ""
    file = PurePath(path)
    stem, dot, ending = file.name.partition(".")
    return str(file.with_name(f"{stem}-{name}{dot}{ending}"))


def _key_of(etcd: str, name: str) -> str:
    """The URLs of etcd with a key of the model's own."""
    if not etcd:
        return ""
    urls = etcd.rstrip("/")
    last = urls.rpartition(",")[2]
    key = parse_etcd(etcd).name
    return f"{urls.removesuffix(last)}{'/'.join(last.split('/')[:3])}/{key}-{name}"
