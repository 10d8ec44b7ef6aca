"""ps-serve --shards N: runs one child process per shard, on consecutive ports, and ends them together.

ps-serve --shards 3 --+--> ps-serve --shard 0/3          (the lead; first, for the others need its address)
                      +--> ps-serve --shard 1/3 --lead ...
                      +--> ps-serve --shard 2/3 --lead ...
"""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from torch_ps.common.options.command_line import arguments_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.parent_death import Lifeline
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.ps.server.ready_file import write_ready

log = logging.getLogger("torch_ps.ps")

#: Seconds in which a shard has to be listening.
START_SECONDS = 60.0
#: Seconds in which the shards have to stop.
STOP_SECONDS = 10.0
#: The same if they write a last checkpoint.
CHECKPOINT_SECONDS = 75.0


def serve_all(config: ServerConfig) -> int:
    """Run all shards until SIGTERM, SIGINT or the end of one. Returns the exit code."""
    stopping: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    lifeline = Lifeline()
    children: list[subprocess.Popen[bytes]] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="ps-serve-") as folder:
        try:
            servers: list[str] = []
            metrics: list[str] = []
            for index in range(config.shards):
                ready = Path(folder, str(index))
                children.append(_start(shard_config(config, index, servers, str(ready)), lifeline))
                if not _wait_for(ready, children, stopping):
                    failed = not stopping
                    break
                told = json.loads(ready.read_text(encoding="utf-8"))
                servers += told["servers"]
                metrics += told["metrics"]
            else:
                log.info("all %d shards listen: %s", config.shards, ",".join(servers))
                if config.ready_file:
                    write_ready(config.ready_file, servers, metrics)
                while not stopping and not failed:
                    failed = any(child.poll() is not None for child in children)
                    time.sleep(0.1)
        finally:
            _stop(children, CHECKPOINT_SECONDS if config.checkpoint else STOP_SECONDS)
    if failed:
        log.error("a shard has ended, so the job ends; its own lines above say why")
    return 1 if failed else 0


def shard_config(config: ServerConfig, index: int, servers: list[str], ready_file: str) -> ServerConfig:
    """Options of shard ``index``: those of ``config`` but for its own address, place and ready file.

    Args:
        config: options of the parent.
        index: number of the shard, from 0.
        servers: addresses of the shards that already listen, the lead first.
        ready_file: path that the shard writes when it listens.
    """

    def consecutive(text: str) -> str:
        first = address.parse(text, free_port=True)
        return str(Address(first.host, first.port and first.port + index))

    return dataclasses.replace(
        config,
        listen=consecutive(config.listen),
        metrics=config.metrics if config.metrics == "off" else consecutive(config.metrics),
        shards=1,
        shard=f"{index}/{config.shards}",
        lead=servers[0] if index else "",
        trace="" if index else config.trace,
        trace_steps="" if index else config.trace_steps,
        ready_file=ready_file,
    )


def _start(config: ServerConfig, lifeline: Lifeline) -> subprocess.Popen[bytes]:
    # The environment has been read into ``config``; the child must not read it again.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PS_")} | lifeline.environment
    return subprocess.Popen(
        [sys.executable, "-m", "torch_ps.ps.server.cli", *arguments_of(config)],
        env=environment,
        pass_fds=lifeline.fds,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its children in order
    )


def _wait_for(ready: Path, children: list[subprocess.Popen[bytes]], stopping: list[int]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not stopping:
        if ready.exists():
            return True
        if any(child.poll() is not None for child in children):
            return False
        time.sleep(0.02)
    return False


def _stop(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
