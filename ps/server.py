"""One shard as a process: socket, health, metrics, signals, and an end without loose ends.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from torch_ps.common import address, channel, optim
from torch_ps.common.address import Address
from torch_ps.common.config import DEFAULT_SLACK, MOST_APPLY_THREADS, ServerConfig, parse_compensation, parse_shard
from torch_ps.common.device import choose
from torch_ps.common.errors import ConfigError, PsError, ServerStopped
from torch_ps.common.memory import keep_freed_memory
from torch_ps.ps.core.mode import Mode
from torch_ps.ps.follow import follow, norms_of
from torch_ps.ps.job import Job
from torch_ps.ps.metrics import Metrics
from torch_ps.ps.servicer import Servicer
from torch_ps.ps.store import CPU

log = logging.getLogger("torch_ps.ps")

#: Seconds that open calls get to end when the server stops.
GRACE = 1.0


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a shard listens; ``metrics`` is None when it has none."""

    server: Address
    metrics: Address | None


async def serve(config: ServerConfig, on_ready: Callable[[Ready], None]) -> None:
    """Run one shard until SIGTERM or SIGINT.

    Raises:
        ConfigError: there is no such device, or an address cannot be bound.
        PsError: the shard failed; its log has the reason.
    """
    index, num_shards = parse_shard(config.shard)
    device = choose(config.device, index)
    torch.set_num_threads(1)
    keep_freed_memory()
    optim.build(
        "SGD", [torch.zeros(1)], {"lr": 0.1}
    )  # torch.optim loads its parts at first use, a second that no step should pay
    stop = asyncio.Event()
    failure: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        log.error("shard %d fails", index, exc_info=error)
        failure.append(error)
        stop.set()

    metrics = Metrics()
    compensation, strength = parse_compensation(config.delay_compensation)
    mode = Mode(
        name=config.mode,
        slack=DEFAULT_SLACK if config.slack is None else config.slack,
        backup_workers=config.backup_workers,
        max_staleness=config.max_staleness,
        staleness_lr=config.staleness_lr,
        delay_compensation=compensation,
        compensation_strength=strength or 1.0,
    )
    with ThreadPoolExecutor(_apply_threads(config), thread_name_prefix="apply") as executor:
        job = Job(
            mode=mode,
            index=index,
            num_shards=num_shards,
            quorum=config.workers,
            lease=config.lease,
            bucket_bytes=int(config.bucket_size * (1 << 20)),
            executor=executor,
            metrics=metrics,
            on_failure=on_failure,
            clip_norm=config.clip_norm,
            ask_norm=norms_of(address.parse(config.lead), index) if index else None,
            device=device,
        )
        served = _serve_metrics(config, metrics)  # first: nothing has to be undone if this address is taken
        server, listening = await _listen(config, job)
        job.port = listening.port
        background = asyncio.create_task(_lead(job) if index == 0 else follow(job, address.parse(config.lead)))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        log.info(
            "shard %d of %d listens on %s; mode %s, %d worker%s to start%s%s",
            index,
            num_shards,
            listening,
            mode,
            config.workers,
            "" if config.workers == 1 else "s",
            "" if device == CPU else f"; parameters on {device}",
            f"; metrics on http://{served}/metrics" if served else "",
        )
        on_ready(Ready(listening, served))
        await stop.wait()
        log.info("shard %d stops", index)
        background.cancel()
        job.stop(ServerStopped(f"shard {index} was stopped; start the job again"))
        await server.stop(GRACE)
        # gRPC's own tasks end a moment later; cut off by the end of the loop they would print a traceback.
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=GRACE)
    if failure:
        raise PsError(f"shard {index} failed: {failure[0]!r}")


def _apply_threads(config: ServerConfig) -> int:
    return config.apply_threads or min(len(os.sched_getaffinity(0)), MOST_APPLY_THREADS)


async def _listen(config: ServerConfig, job: Job) -> tuple[grpc.aio.Server, Address]:
    server = grpc.aio.server(options=channel.OPTIONS)
    server.add_generic_rpc_handlers((Servicer(job).handlers(),))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    await checks.set(channel.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    wanted = address.parse(config.listen, free_port=True)
    try:
        port = server.add_insecure_port(str(wanted))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {wanted}: the port is in use or the address is not one of this machine; "
            "choose another with --listen, or port 0 for any free one"
        ) from None
    await server.start()
    return server, Address(wanted.host, port)


def _serve_metrics(config: ServerConfig, metrics: Metrics) -> Address | None:
    if config.metrics == "off":
        return None
    wanted = address.parse(config.metrics, free_port=True)
    try:
        return metrics.serve(wanted)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {wanted}: {error.strerror}; choose another with --metrics, or off"
        ) from None


async def _lead(job: Job) -> None:
    """Watch the leases."""
    while True:
        await asyncio.sleep(min(job.lease / 8, 1.0))
        job.tick()
