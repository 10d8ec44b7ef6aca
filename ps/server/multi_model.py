"""ps-serve --models gen,critic: runs the servers of each model as a child process, and ends them together.

ps-serve --models gen,critic --+--> ps-serve --job gen      (its shards, one after the other on the next ports)
                               +--> ps-serve --job critic
"""

import dataclasses
import logging

from torch_ps.common.memory_limit import memory
from torch_ps.common.options.models import names_of_models, options_of_model
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.server.children import ServerChildren
from torch_ps.ps.server.ready_file import write_ready

log = logging.getLogger("torch_ps.ps")

#: Seconds that the parent of a model's shards needs beside their own to stop.
PARENT_SECONDS = 5.0


def serve_models(config: ServerConfig) -> int:
    """Run the servers of all models until SIGTERM, SIGINT or the end of one. Returns the exit code."""
    names = names_of_models(config.models)
    if not config.max_model:  # all of them have this machine's memory together
        config = dataclasses.replace(config, max_model=memory().free / 2**30 / config.shards / len(names))
    servers: list[str] = []
    metrics: list[str] = []
    with ServerChildren(
        checkpoints=bool(config.checkpoint), seconds=PARENT_SECONDS, ready_file=config.ready_file
    ) as children:
        files = []
        for index in range(len(names)):
            files.append(children.new_ready_file())
            children.start(dataclasses.replace(options_of_model(config, index), ready_file=files[-1]))
        for name, file in zip(names, files, strict=True):
            told = children.wait_for(file)
            if told is None:
                break
            servers.append(f"{name}={','.join(told['servers'])}")
            metrics += told["metrics"]
        else:
            log.info("the servers of all %d models listen: %s", len(names), ";".join(servers))
            if config.ready_file:
                write_ready(config.ready_file, [";".join(servers)], metrics)
            children.wait()
    if children.failed:
        log.error("the servers of a model have ended, so all end; their own lines above say why")
    elif children.ended_badly:
        log.error("the servers of a model have not ended well; their own lines above say why")
    return 1 if children.failed or children.ended_badly else 0
