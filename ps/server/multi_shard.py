"""ps-serve --shards N: runs one child process per shard, on consecutive ports, and ends them together.

ps-serve --shards 3 --+--> ps-serve --shard 0/3          (the lead; first, for the others need its address)
                      +--> ps-serve --shard 1/3 --lead ...
                      +--> ps-serve --shard 2/3 --lead ...
"""

import dataclasses
import logging

from torch_ps.common.memory_limit import memory
from torch_ps.common.options.models import shift_data_port, shift_port
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.server.children import ServerChildren
from torch_ps.ps.server.ready_file import write_ready

log = logging.getLogger("torch_ps.ps")


def serve_all(config: ServerConfig) -> int:
    """Run all shards until SIGTERM, SIGINT or the end of one. Returns the exit code."""
    servers: list[str] = []
    metrics: list[str] = []
    if not config.max_model:  # all of them have this machine's memory together
        config = dataclasses.replace(config, max_model=memory().free / 2**30 / config.shards)
    with ServerChildren(checkpoints=bool(config.checkpoint), ready_file=config.ready_file) as children:
        for index in range(config.shards):
            ready = children.new_ready_file()
            children.start(shard_config(config, index, servers, ready))
            told = children.wait_for(ready)
            if told is None:
                break
            servers += told["servers"]
            metrics += told["metrics"]
        else:
            log.info("all %d shards listen: %s", config.shards, ",".join(servers))
            if config.ready_file:
                write_ready(config.ready_file, servers, metrics)
            children.wait()
    if children.failed:
        log.error("a shard has ended, so the job ends; its own lines above say why")
    elif children.ended_badly:
        log.error("a shard has not ended well; its own lines above say why")
    return 1 if children.failed or children.ended_badly else 0


def shard_config(config: ServerConfig, index: int, servers: list[str], ready_file: str) -> ServerConfig:
    """Options of shard ``index``: those of ``config`` but for its own address, place and ready file.

    Args:
        config: options of the parent.
        index: number of the shard, from 0.
        servers: addresses of the shards that already listen, the lead first.
        ready_file: path that the shard writes when it listens.
    """
    return dataclasses.replace(
        config,
        listen=shift_port(config.listen, index),
        data_port=shift_data_port(config.data_port, index),
        metrics=config.metrics if config.metrics == "off" else shift_port(config.metrics, index),
        shards=1,
        shard=f"{index}/{config.shards}",
        lead=servers[0] if index else "",
        trace="" if index else config.trace,
        trace_steps="" if index else config.trace_steps,
        ready_file=ready_file,
    )
