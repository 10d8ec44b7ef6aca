"""One shard as a process: socket, health, metrics, signals, and an end without loose ends.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from torch_ps.common import address, channel, optim
from torch_ps.common.address import Address
from torch_ps.common.config import (
    DEFAULT_CHECKPOINT_SECONDS,
    DEFAULT_SLACK,
    MOST_APPLY_THREADS,
    ServerConfig,
)
from torch_ps.common.credentials import Access, port_credentials
from torch_ps.common.device import choose as choose_device
from torch_ps.common.errors import ConfigError, NotServing, PsError, ServerStopped
from torch_ps.common.forms import parse_compensation, parse_etcd, parse_shard
from torch_ps.common.memory import keep_freed_memory
from torch_ps.common.tls import Tls
from torch_ps.common.token import TokenFile
from torch_ps.ps import limits
from torch_ps.ps.checkpoint import Checkpoints
from torch_ps.ps.core.mode import Mode
from torch_ps.ps.core.tenure import LeasedSeat
from torch_ps.ps.door import Door
from torch_ps.ps.etcd import Etcd
from torch_ps.ps.follow import NORM_SECONDS, follow, norms_of, report_to, resumed_version
from torch_ps.ps.job import Job, elected
from torch_ps.ps.keeper import Keeper, Tell
from torch_ps.ps.lead import Lead
from torch_ps.ps.manifest import Manifest
from torch_ps.ps.metrics import Metrics
from torch_ps.ps.pages import Pages
from torch_ps.ps.resume import choose, restore
from torch_ps.ps.rivals import deposed, rivals
from torch_ps.ps.servicer import Servicer
from torch_ps.ps.standby import Standby, inherit, name_of, options_of
from torch_ps.ps.store import CPU
from torch_ps.ps.tenure import SHORTEST_LEASE, Tenure

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
    if config.standby_of:
        access.check(address.parse(config.standby_of))
        config = await inherit(config, access)
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
        if not isinstance(error, NotServing):
            log.error("shard %d fails", index, exc_info=error)
        failure.append(error)
        stop.set()

    metrics, beat = Metrics(), Beat()
    lead = Lead([address.parse(config.lead)]) if index else None
    if lead is not None:
        access.check(lead.address)
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
    server, listening = _bind(config, tls, token, metrics)
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
            ask_norm=norms_of(lead, index, access, NORM_SECONDS + 2 * config.lease) if lead is not None else None,
            max_workers=config.max_workers,
            device=device,
            name=name_of(listening),
            primary=config.standby_of,
            seat=LeasedSeat if config.etcd else elected,
            lead=lead,
        )
        job.succession.on_step_down = lambda step_down: None if job.closed else on_failure(deposed(job, step_down))
        tenure = _tenure(config, job, as_client)
        keeper = await _keeper(config, job, lead, access) if config.checkpoint else None
        standby = Standby(job, address.parse(config.standby_of), listening, access) if config.standby_of else None
        pages = _pages(config, metrics, beat)  # first: nothing has to be undone if this address is taken
        await _listen(config, job, server)
        job.port = listening.port
        background = [
            asyncio.create_task(each)
            for each in (
                _work(job, keeper, standby, lead, access, on_failure),
                beat.keep(),
                job.succession.keep(),
                rivals(job, access),
                *([_hold(tenure, on_failure)] if tenure is not None else []),
                _show(job),
            )
        ]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        log.info(
            "shard %d of %d listens on %s, %s; mode %s, %d worker%s to start%s%s%s",
            index,
            num_shards,
            listening,
            _protection(tls, token),
            mode,
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
        for task in background:
            task.cancel()
        job.stop(_last_words(job, failure))
        await server.stop(GRACE)
        # gRPC's own tasks end a moment later; cut off by the end of the loop they would print a traceback.
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=GRACE)
        if tenure is not None:
            await tenure.give_up()
    if failure:
        raise failure[0] if isinstance(failure[0], NotServing) else PsError(f"shard {index} failed: {failure[0]!r}")


async def _show(job: Job) -> None:
    """Keep the metrics about the standby up to date."""
    while True:
        records, seconds = job.lag()
        job.metrics.lag_records.set(records)
        job.metrics.lag_seconds.set(seconds)
        job.metrics.term.set(job.succession.seat.configuration.term.number)
        job.metrics.serving.set(not job.closed)
        await asyncio.sleep(1.0)


def _last_words(job: Job, failure: list[BaseException]) -> PsError:
    """What open streams end with: whether their workers find another server of this shard."""
    if failure and isinstance(failure[0], NotServing):
        return failure[0]
    if job.closed or job.succession.seat.configuration.standby:
        return NotServing(f"shard {job.index} was stopped here; its standby goes on")
    return ServerStopped(f"shard {job.index} was stopped; start the job again")


async def _work(
    job: Job,
    keeper: Keeper | None,
    standby: Standby | None,
    lead: Lead | None,
    access: Access,
    on_failure: Callable[[BaseException], None],
) -> None:
    """What a shard does beside answering: wait for its turn if it is a standby, then follow or be the lead."""
    if standby is not None:
        try:
            await standby.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, this server cannot serve
            on_failure(error)
            return
    await (follow(job, lead, access) if lead is not None else _lead(job, keeper))


def _tenure(config: ServerConfig, job: Job, tls: Tls | None) -> Tenure | None:
    """What keeps hold of the seat, where etcd says who serves."""
    if not config.etcd:
        return None
    seconds = max(math.ceil(config.lease), SHORTEST_LEASE)
    tenure = Tenure(job.succession, Etcd(parse_etcd(config.etcd), job.index, seconds, tls), seconds)
    job.succession.on_transact = tenure.want
    return tenure


async def _hold(tenure: Tenure, on_failure: Callable[[BaseException], None]) -> None:
    try:
        await tenure.keep()
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing more would be acknowledged
        on_failure(error)


def _apply_threads(config: ServerConfig) -> int:
    return config.apply_threads or min(len(os.sched_getaffinity(0)), MOST_APPLY_THREADS)


def _bind(
    config: ServerConfig, tls: Tls | None, token: TokenFile | None, metrics: Metrics
) -> tuple[grpc.aio.Server, Address]:
    server = grpc.aio.server(
        interceptors=[Door(token, metrics)] if token is not None else [],
        options=channel.server_options(2 * config.max_workers + 256, anybody=token is None),
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
    servicer = Servicer(job, max_workers=config.max_workers, max_model=most, options=options_of(config))
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


def _pages(config: ServerConfig, metrics: Metrics, beat: "Beat") -> Pages | None:
    if config.metrics == "off":
        return None
    wanted = address.parse(config.metrics, free_port=True)
    try:
        return Pages(wanted, metrics.registry, lambda: beat.missing(time.monotonic()))
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


async def _keeper(config: ServerConfig, job: Job, lead: Lead | None, access: Access) -> Keeper:
    """What keeps this shard's checkpoints; goes on from one if it is to.

    Raises:
        ConfigError: there are checkpoints and the job is not to go on from them.
        CheckpointError: they cannot be used; says why.
    """
    checkpoints = Checkpoints(config.checkpoint)
    manifest: Manifest | None = None
    resume = config.resume or config.resume_previous
    tell: Tell | None = None
    if config.standby_of:
        tell = report_to(lead, access) if lead is not None else None  # it goes on from what its primary has
    elif lead is None:
        manifest = choose(checkpoints, resume=resume, previous=config.resume_previous)
    else:
        tell = report_to(lead, access)
        version = await resumed_version(lead, access)
        manifest = checkpoints.read(version) if version else None
    seconds = config.checkpoint_seconds or (0.0 if config.checkpoint_every else DEFAULT_CHECKPOINT_SECONDS)
    keeper = Keeper(job, checkpoints, every=config.checkpoint_every, seconds=seconds, keep=config.keep, tell=tell)
    if manifest is not None:
        restore(job, checkpoints, manifest)
        keeper.facts.version = manifest.version
    return keeper


async def _lead(job: Job, keeper: Keeper | None) -> None:
    """Watch the leases, and whether it is time for a checkpoint."""
    while True:
        await asyncio.sleep(min(job.lease / 8, 1.0))
        job.tick()
        if keeper is not None:
            keeper.plan()
