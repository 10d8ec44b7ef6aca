"""One shard as a process: socket, health, metrics, signals, and an end without loose ends.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
import logging
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.allocator import keep_freed_memory
from torch_ps.common.devices import choose as choose_device
from torch_ps.common.errors import ConfigError, NotServing, PsError, Restarted, ServerStopped
from torch_ps.common.options.config import (
    DEFAULT_CHECKPOINT_SECONDS,
    MOST_APPLY_THREADS,
    ServerConfig,
)
from torch_ps.common.options.forms import parse_etcd, parse_shard
from torch_ps.common.options.trace_options import parse_steps
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access, port_credentials
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.token import TokenFile
from torch_ps.common.trace import steps_of
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.ps.checkpoint.checkpointer import Checkpointer
from torch_ps.ps.checkpoint.manifest import Manifest
from torch_ps.ps.checkpoint.repository import Checkpoints
from torch_ps.ps.checkpoint.resume import choose, restore
from torch_ps.ps.cluster.lead_client import NORM_SECONDS, follow, norms_of, report_to, trace_to
from torch_ps.ps.cluster.registration import enter
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.core.membership import tick_seconds
from torch_ps.ps.engine.parameter_store import CPU
from torch_ps.ps.engine.state import ReportKept
from torch_ps.ps.failover.etcd import EtcdClient
from torch_ps.ps.failover.etcd_lease import SHORTEST_LEASE, EtcdLease
from torch_ps.ps.failover.fencing import deposed, rivals
from torch_ps.ps.failover.standby import Standby, inherit, name_of
from torch_ps.ps.job.job import Job, elected
from torch_ps.ps.job.job_options import dump_options, mode_of
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.job.metrics_exporter import register_metrics
from torch_ps.ps.observability.http import HttpServer
from torch_ps.ps.observability.metrics import Metrics
from torch_ps.ps.observability.trace_collector import ShardTrace
from torch_ps.ps.server.servicer import Servicer
from torch_ps.ps.transport import limits
from torch_ps.ps.transport.auth import TokenInterceptor

log = logging.getLogger("torch_ps.ps")

#: Seconds that open calls get to end when the server stops.
GRACE = 1.0
#: Seconds without a beat of the event loop after which a shard is not healthy.
NO_BEAT_SECONDS = 10.0


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
    tls = Tls(config.tls_ca, config.tls_cert, config.tls_key) if config.tls_cert else None
    token = TokenFile(config.token_file) if config.token_file else None
    # Without a tls_ca the lead is believed if the chain behind this shard's own certificate vouches for it too.
    as_client = tls and Tls(config.tls_ca or config.tls_cert, config.tls_cert, config.tls_key)
    access = Access(as_client, token, config.insecure)
    inherited: pb.JobDescription | None = None
    if config.standby_of:
        access.check(address.parse(config.standby_of))
        config, inherited = await inherit(config, access)
    index, num_shards = parse_shard(config.shard)
    device = choose_device(config.device, index)
    torch.set_num_threads(1)
    keep_freed_memory()
    optim.build(
        "SGD", [torch.zeros(1)], {"lr": 0.1}
    )  # torch.optim loads its parts at first use, a second that no step should pay
    stop = asyncio.Event()
    failure: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        if isinstance(error, PsError):
            log.error("shard %d fails: %s", index, error)
        else:
            log.error("shard %d fails", index, exc_info=error)
        failure.append(error)
        stop.set()

    metrics, beat = Metrics(), Beat()
    lead = LeadAddress([address.parse(config.lead)]) if index else None
    if lead is not None:
        access.check(lead.address)
    server, listening = _bind(config, tls, token, metrics)
    if inherited is not None:
        number, resumed = inherited.incarnation, 0  # it goes on from what its primary has
        steps = range(0)
    elif lead is None:
        number, resumed = secrets.randbits(62) + 1, 0
        steps = parse_steps(config.trace_steps if config.trace else "")
    else:
        entered = await enter(lead.address, index, num_shards, access)
        number, resumed = entered.incarnation, entered.resumed_version
        steps = steps_of(entered.trace)
        if resumed and not config.checkpoint:
            raise ConfigError(
                f"the lead goes on from version {resumed} of a checkpoint; give shard {index} the same --checkpoint"
            )
    with ThreadPoolExecutor(_apply_threads(config), thread_name_prefix="apply") as executor:
        job = Job(
            mode=mode_of(config),
            index=index,
            num_shards=num_shards,
            incarnation=Incarnation(number, index, num_shards, continued=inherited is not None),
            quorum=config.workers,
            lease=config.lease,
            bucket_bytes=int(config.bucket_size * (1 << 20)),
            executor=executor,
            metrics=metrics,
            on_failure=on_failure,
            clip_norm=config.clip_norm,
            ask_norm=norms_of(lead, index, number, access, NORM_SECONDS + 2 * config.lease, config.lease)
            if lead is not None
            else None,
            max_workers=config.max_workers,
            device=device,
            name=name_of(listening),
            primary=config.standby_of,
            seat=LeasedSeat if config.etcd else elected,
            lead=lead,
            apply_threads=_apply_threads(config),
            trace=ShardTrace(
                steps, config.trace, num_shards - 1, trace_to(lead, index, number, access) if lead is not None else None
            ),
        )
        job.seat_driver.on_step_down = lambda step_down: None if job.closed else on_failure(deposed(job, step_down))
        if config.restart_together:
            job.on_alone = on_failure
        tenure = _tenure(config, job, as_client)
        tell = report_to(lead, number, access) if lead is not None else None
        keeper = _keeper(config, job, tell, resumed) if config.checkpoint else None
        standby = Standby(job, address.parse(config.standby_of), listening, access) if config.standby_of else None
        pages = _pages(
            config, metrics, beat, register_metrics(job)
        )  # first: nothing has to be undone if this address is taken
        await _listen(config, job, server)
        job.port = listening.port
        background = [
            asyncio.create_task(each)
            for each in (
                _work(job, keeper, standby, lead, access),
                beat.keep(),
                job.seat_driver.keep(),
                rivals(job, access),
                *([tenure.keep()] if tenure is not None else []),
                job.trace.keep(),
            )
        ]
        for task in background:
            task.add_done_callback(lambda task: _ended(task, on_failure))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        log.info(
            "shard %d of %d listens on %s, %s; mode %s, %d worker%s to start%s%s%s",
            index,
            num_shards,
            listening,
            _protection(tls, token),
            job.mode,
            config.workers,
            "" if config.workers == 1 else "s",
            f"; standby of {config.standby_of}" if config.standby_of else "",
            "" if device == CPU else f"; parameters on {device}",
            f"; metrics on http://{pages.address}/metrics" if pages else "",
        )
        _warn(listening, tls, token)
        on_ready(Ready(listening, pages.address if pages else None))
        await stop.wait()
        log.info("shard %d stops", index)
        if keeper is not None and not failure:
            await keeper.finish()
        await job.trace.finish()
        for task in background:
            task.cancel()
        other = bool(job.closed or job.seat_driver.seat.configuration.standby)
        job.stop(last_word(index, failure, standby=other))
        await server.stop(GRACE)
        # gRPC's own tasks end a moment later; cut off by the end of the loop they would print a traceback.
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=GRACE)
        if tenure is not None:
            await tenure.give_up()
    if failure:
        raise PsError(f"shard {index} failed: {_said(failure[0])}")


def _ended(task: asyncio.Task[None], on_failure: Callable[[BaseException], None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        on_failure(error)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, PsError) else repr(error)


def last_word(index: int, failure: list[BaseException], *, standby: bool = False) -> PsError:
    """What the workers of a shard that ends are told; ``standby``: another server goes on in its place."""
    if failure and isinstance(failure[0], NotServing | Restarted):  # another one serves, or it may be back soon
        return failure[0]
    if standby:
        return NotServing(f"shard {index} has ended here; its other server goes on")
    if not failure:
        return ServerStopped(f"shard {index} was stopped; start the job again")
    return ServerStopped(f"shard {index} failed: {_said(failure[0])}")


async def _work(
    job: Job, keeper: Checkpointer | None, standby: Standby | None, lead: LeadAddress | None, access: Access
) -> None:
    """What a shard does beside answering: wait for its turn if it is a standby, then follow or be the lead."""
    if standby is not None:
        await standby.run()
    await (follow(job, lead, access) if lead is not None else _lead(job, keeper))


def _tenure(config: ServerConfig, job: Job, tls: Tls | None) -> EtcdLease | None:
    """What keeps hold of the seat, where etcd says who serves."""
    if not config.etcd:
        return None
    seconds = max(math.ceil(config.lease), SHORTEST_LEASE)
    tenure = EtcdLease(job.seat_driver, EtcdClient(parse_etcd(config.etcd), job.index, seconds, tls), seconds)
    job.seat_driver.on_transact = tenure.want
    return tenure


def _apply_threads(config: ServerConfig) -> int:
    return config.apply_threads or min(len(os.sched_getaffinity(0)), MOST_APPLY_THREADS)


def _bind(
    config: ServerConfig, tls: Tls | None, token: TokenFile | None, metrics: Metrics
) -> tuple[grpc.aio.Server, Address]:
    anybody = token is None and not (tls is not None and tls.ca) and not config.insecure
    server = grpc.aio.server(
        interceptors=[TokenInterceptor(token, metrics)] if token is not None else [],
        options=channel.server_options(3 * config.max_workers + 256, anybody=anybody),
        maximum_concurrent_rpcs=4 * config.max_workers + 256,
    )
    wanted = address.parse(config.listen, free_port=True)
    try:
        if tls is None:
            port = server.add_insecure_port(str(wanted))
        else:
            port = server.add_secure_port(str(wanted), port_credentials(tls))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {wanted}: the port is in use or the address is not one of this machine; "
            "choose another with --listen, or port 0 for any free one"
        ) from None
    return server, Address(wanted.host, port)


async def _listen(config: ServerConfig, job: Job, server: grpc.aio.Server) -> None:
    most = int(config.max_model * 2**30) or limits.machine_memory()
    servicer = Servicer(job, max_workers=config.max_workers, max_model=most, options=dump_options(config))
    await servicer.listen()
    server.add_generic_rpc_handlers((servicer.handlers(),))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    await checks.set(channel.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()


def _protection(tls: Tls | None, token: TokenFile | None) -> str:
    secured = "in the clear" if tls is None else "mutual TLS" if tls.ca else "TLS"
    return f"{secured}, {'with' if token is not None else 'without'} token"


def _warn(listening: Address, tls: Tls | None, token: TokenFile | None) -> None:
    """Say what an address that others can reach is not protected against."""
    if listening.loopback:
        return
    if token is None and (tls is None or not tls.ca):
        log.warning("whoever reaches %s can take part: nothing asks who it is (tls_ca, token_file)", listening)
    if tls is None:
        log.warning("whoever is on the way to %s can read and change what is sent, a token too", listening)


def _pages(config: ServerConfig, metrics: Metrics, beat: "Beat", refresh: Callable[[], None]) -> HttpServer | None:
    if config.metrics == "off":
        return None
    wanted = address.parse(config.metrics, free_port=True)
    try:
        return HttpServer(wanted, metrics.registry, lambda: beat.missing(time.monotonic()), refresh)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {wanted}: {error.strerror}; choose another with --metrics, or off"
        ) from None


class Beat:
    """Whether the event loop still runs, told to other threads."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    async def keep(self) -> None:
        while True:
            self._last = time.monotonic()
            await asyncio.sleep(1.0)

    def missing(self, now: float) -> str:
        """Why the shard is not healthy; "" if it is."""
        silent = now - self._last
        return f"the event loop has not run for {silent:.0f} s" if silent > NO_BEAT_SECONDS else ""


def _keeper(config: ServerConfig, job: Job, tell: ReportKept | None, resumed: int) -> Checkpointer:
    """What keeps this shard's checkpoints; goes on from one if it is to.

    Args:
        tell: how another shard than the lead reports to it.
        resumed: version that the lead has gone on from.

    Raises:
        ConfigError: there are checkpoints and the job is not to go on from them.
        CheckpointError: they cannot be used; says why.
    """
    checkpoints = Checkpoints(config.checkpoint)
    manifest: Manifest | None = None
    resume = config.resume or config.resume_previous
    if tell is None and not config.standby_of:
        manifest = choose(checkpoints, resume=resume, previous=config.resume_previous)
    else:
        manifest = checkpoints.read(resumed) if resumed else None
    seconds = config.checkpoint_seconds or (0.0 if config.checkpoint_every else DEFAULT_CHECKPOINT_SECONDS)
    keeper = Checkpointer(job, checkpoints, every=config.checkpoint_every, seconds=seconds, keep=config.keep, tell=tell)
    if manifest is not None:
        restore(job, checkpoints, manifest)
        keeper.facts.version = manifest.version
    return keeper


async def _lead(job: Job, keeper: Checkpointer | None) -> None:
    """Watch the leases, and whether it is time for a checkpoint."""
    while True:
        await asyncio.sleep(tick_seconds(job.lease))
        job.tick()
        if keeper is not None:
            keeper.plan()
