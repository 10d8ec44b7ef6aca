"""One shard as a process: settles what it is, makes its objects, runs them until it is told to end.

    serve --> _place (options, device, incarnation) --> _compose (every object, and who listens to whom)
          --> _run (port open, background tasks) --> signal or failure --> _stop

Rules of this file
  1. Objects get each other by constructor; listeners are registered in ``_compose`` and nowhere else.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.allocator import keep_freed_memory
from torch_ps.common.daemon_thread import to_daemon_thread
from torch_ps.common.devices import choose as choose_device
from torch_ps.common.end_patience import show_work
from torch_ps.common.errors import CheckpointError, ConfigError, PsError
from torch_ps.common.memory_limit import memory
from torch_ps.common.options.parsers import parse_etcd, parse_shard
from torch_ps.common.options.server_config import DEFAULT_CHECKPOINT_SECONDS, MOST_APPLY_THREADS, ServerConfig
from torch_ps.common.options.trace_options import parse_steps
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.token import TokenFile
from torch_ps.common.trace import steps_of
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.ps.checkpoint.checkpointer import Checkpointer
from torch_ps.ps.checkpoint.ownership import Ownership
from torch_ps.ps.checkpoint.repository import Checkpoints
from torch_ps.ps.checkpoint.resume import choose, restore
from torch_ps.ps.cluster.lead_client import LeadClient
from torch_ps.ps.cluster.registration import Registrar, register
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.core.membership import tick_seconds
from torch_ps.ps.engine.parameter_store import CPU
from torch_ps.ps.failover.etcd import EtcdClient
from torch_ps.ps.failover.etcd_lease import SHORTEST_LEASE, EtcdLease
from torch_ps.ps.failover.fencing import Fence
from torch_ps.ps.failover.primary import Replication
from torch_ps.ps.failover.standby import Standby, inherit, name_of
from torch_ps.ps.job.connections import Connections
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.job_options import dump_options, mode_of
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.job.replication_status import ReplicationStatus
from torch_ps.ps.job.seat_driver import SeatDriver, elected
from torch_ps.ps.job.seed_receiver import SeedReceiver
from torch_ps.ps.job.settings import JobSettings
from torch_ps.ps.job.status import StatusReporter
from torch_ps.ps.job.worker_metrics import register_metrics
from torch_ps.ps.observability.http import HttpServer
from torch_ps.ps.observability.loop_health import LoopHealth
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.observability.trace_collector import ShardTrace
from torch_ps.ps.server.endpoint import Endpoint
from torch_ps.ps.server.parts import Parts
from torch_ps.ps.server.servicer import Servicer
from torch_ps.ps.server.shutdown import Shutdown, last_word, text_of

log = logging.getLogger("torch_ps.ps")

#: Seconds in which the checkpoint folder is given back at the end.
RELEASE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Ready:
    """Addresses at which a shard listens; ``metrics`` is None when it serves none."""

    server: Address
    metrics: Address | None


@dataclass(frozen=True, slots=True)
class _Place:
    """What a server is, once its primary and the lead have been asked.

    Attributes:
        config: Options, on a standby with those of its primary.
        settings: Settings of its part of the job.
        incarnation: Start of the servers that it belongs to.
        resumed_version: Version of the checkpoint that the lead went on from; 0 for none, and on the lead.
        traced: Steps that are traced.
        lead: Where the lead is; None on the lead.
        as_client: Certificates for calls to others; None calls in the clear.
        access: The same with the token.
    """

    config: ServerConfig
    settings: JobSettings
    incarnation: Incarnation
    resumed_version: int
    traced: range
    lead: LeadAddress | None
    as_client: Tls | None
    access: Access


async def serve(config: ServerConfig, on_ready: Callable[[Ready], None]) -> None:
    """Run one shard until SIGTERM or SIGINT.

    Raises:
        ConfigError: The device does not exist, or an address cannot be bound.
        PsError: The shard has failed; its log has the reason.
    """
    tls = Tls(config.tls_ca, config.tls_cert, config.tls_key) if config.tls_cert else None
    token = TokenFile(config.token_file) if config.token_file else None
    # Without a tls_ca the lead is trusted if the chain behind this shard's own certificate vouches for it too.
    as_client = tls and Tls(config.tls_ca or config.tls_cert, config.tls_cert, config.tls_key)
    access = Access(as_client, token, config.insecure)
    inherited: pb.JobDescription | None = None
    if config.standby_of:
        access.check(address.parse(config.standby_of))
        config, inherited = await inherit(config, access)
    index, _ = parse_shard(config.shard)
    device = choose_device(config.device, index)
    lead = LeadAddress([address.parse(config.lead)]) if index else None
    if lead is not None:
        access.check(lead.address)
    _prepare_torch()
    metrics, shutdown = Metrics(), Shutdown(index)
    endpoint = Endpoint(config, tls, token, metrics)  # before the lead gives a place to a server that cannot listen
    settings = _settings(config, device)
    place = await _take_place(config, settings, inherited, lead, as_client, access)
    with ThreadPoolExecutor(settings.apply_threads, thread_name_prefix="apply") as executor:
        parts = _compose(place, executor, metrics, endpoint.address, shutdown)
        await _run(place, parts, endpoint, shutdown, on_ready)
    if shutdown.failure is not None:
        raise PsError(f"shard {index} failed: {text_of(shutdown.failure)}")
    if parts.checkpointer is not None and parts.checkpointer.unkept:
        raise CheckpointError(f"shard {index} has ended, and {parts.checkpointer.unkept}")


# -------------------------------------------------------------- what this server is


def _prepare_torch() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    # torch.optim loads its parts at first use, a second that no step should pay.
    optim.build("SGD", [torch.zeros(1)], {"lr": 0.1})


def _settings(config: ServerConfig, device: torch.device) -> JobSettings:
    index, num_shards = parse_shard(config.shard)
    return JobSettings(
        mode=mode_of(config),
        index=index,
        num_shards=num_shards,
        quorum=config.workers,
        lease=config.lease,
        bucket_bytes=int(config.bucket_size * (1 << 20)),
        max_workers=config.max_workers,
        clip_norm=config.clip_norm,
        device=device,
        apply_threads=config.apply_threads or min(len(os.sched_getaffinity(0)), MOST_APPLY_THREADS),
    )


async def _take_place(
    config: ServerConfig,
    settings: JobSettings,
    inherited: pb.JobDescription | None,
    lead: LeadAddress | None,
    as_client: Tls | None,
    access: Access,
) -> _Place:
    """Find out which start of the servers this one belongs to; another shard asks the lead.

    Raises:
        ConfigError: The lead went on from a checkpoint and this shard has no --checkpoint.
    """
    index, num_shards = settings.index, settings.num_shards
    resumed, traced = 0, range(0)
    if inherited is not None:
        number = inherited.incarnation  # a standby goes on from what its primary has
    elif lead is None:
        number = secrets.randbits(62) + 1
        traced = parse_steps(config.trace_steps if config.trace else "")
    else:
        entered = await register(lead.address, index, num_shards, lead.secret, access)
        number, resumed, traced = entered.incarnation, entered.resumed_version, steps_of(entered.trace)
        if resumed and not config.checkpoint:
            raise ConfigError(
                f"the lead goes on from version {resumed} of a checkpoint; give shard {index} the same --checkpoint"
            )
    incarnation = Incarnation(number, index, num_shards, lease=settings.lease, continued=inherited is not None)
    return _Place(config, settings, incarnation, resumed, traced, lead, as_client, access)


# -------------------------------------------------------------- composition


def _compose(place: _Place, executor: Executor, metrics: Metrics, here: Address, shutdown: Shutdown) -> Parts:
    """Make the objects of a shard and register who listens to whom; go on from a checkpoint if there is one to.

    Raises:
        ConfigError: There are checkpoints and the job is not to go on from them.
        CheckpointError: They cannot be used; the message says why.
    """
    config, settings, access = place.config, place.settings, place.access
    number = place.incarnation.number
    lead = None
    if place.lead is not None:
        lead = LeadClient(place.lead, shard=settings.index, incarnation=number, access=access, lease=settings.lease)
    job = Job(
        settings,
        incarnation=place.incarnation,
        executor=executor,
        metrics=metrics,
        on_failure=shutdown.fail,
        request_norm=lead.request_norm if lead else None,
        trace=ShardTrace(place.traced, config.trace, settings.num_shards - 1, lead.send_trace if lead else None),
    )
    driver = SeatDriver(LeasedSeat if config.etcd else elected, name_of(here), config.standby_of, job.streams)
    job.speakers.electorate = lambda: driver.seat.electorate
    replication = Replication(job, driver, place.lead)
    standby = None
    if config.standby_of:
        primary = address.parse(config.standby_of)
        standby = Standby(job, driver, primary=primary, here=here, access=access, lead=place.lead)
    status = ReplicationStatus(replication, standby)
    fence = Fence(settings.index, driver, status, access, shutdown.fail)
    lease = _etcd_lease(place, driver) if config.etcd else None
    checkpointer = _checkpointer(place, job, lead, here) if config.checkpoint else None

    for job_listener in (checkpointer, replication):
        if job_listener is not None:
            job.add_listener(job_listener)
    for seat_listener in (job.rosters, replication, standby, lease, fence):
        if seat_listener is not None:
            driver.add_listener(seat_listener)

    if checkpointer is not None:
        _resume(place, job, checkpointer)
    return Parts(
        job=job,
        driver=driver,
        connections=Connections(job, driver, here.port),
        seeds=SeedReceiver(job),
        registrar=Registrar(place.incarnation, shutdown.fail if config.restart_together else None),
        replication=replication,
        standby=standby,
        replication_status=status,
        fence=fence,
        lease=lease,
        lead=lead,
        checkpointer=checkpointer,
        status=StatusReporter(job, driver, status, checkpointer.facts if checkpointer else None),
    )


def _etcd_lease(place: _Place, driver: SeatDriver) -> EtcdLease:
    seconds = max(math.ceil(place.config.lease), SHORTEST_LEASE)
    client = EtcdClient(parse_etcd(place.config.etcd), place.settings.index, seconds, place.as_client)
    return EtcdLease(driver, client, seconds)


def _checkpointer(place: _Place, job: Job, lead: LeadClient | None, here: Address) -> Checkpointer:
    config, checkpoints = place.config, Checkpoints(place.config.checkpoint)
    return Checkpointer(
        job,
        checkpoints,
        Ownership(checkpoints.storage, incarnation=place.incarnation.number, job=config.job, address=str(here)),
        every=config.checkpoint_every,
        seconds=config.checkpoint_seconds or (0.0 if config.checkpoint_every else DEFAULT_CHECKPOINT_SECONDS),
        keep=config.keep,
        report=lead.report_kept if lead else None,
    )


def _resume(place: _Place, job: Job, checkpointer: Checkpointer) -> None:
    """Try the place of the checkpoints, and go on from the one that the lead chooses, if this server is no standby."""
    config, checkpoints = place.config, checkpointer.checkpoints
    try:
        checkpoints.storage.try_writing()
    except CheckpointError as error:
        raise CheckpointError(f"{error}; make that place writable, or give another --checkpoint") from None
    if place.lead is not None:
        try:
            checkpointer.ownership.check_place()
        except CheckpointError as error:
            if not config.standby_of:
                raise
            log.warning("after a takeover no checkpoint can be written: %s", error)  # better than no standby
    elif not config.standby_of:  # a standby of the lead comes to own the place when it takes over
        checkpointer.ownership.claim()
    if place.lead is None and not config.standby_of:
        resume = config.resume or config.resume_previous
        manifest = choose(checkpoints, resume=resume, previous=config.resume_previous)
    else:
        manifest = checkpoints.read(place.resumed_version) if place.resumed_version else None
    if manifest is not None:
        restore(job, checkpoints, manifest)
        checkpointer.facts.version = manifest.version


# -------------------------------------------------------------- its life


async def _run(
    place: _Place, parts: Parts, endpoint: Endpoint, shutdown: Shutdown, on_ready: Callable[[Ready], None]
) -> None:
    """Open the ports, work until ``shutdown``, and end in order."""
    health = LoopHealth()
    refresh = register_metrics(parts.job.metrics, place.settings, parts.status)
    http = _serve_http(place.config, parts.job.metrics, health, refresh)  # first: nothing has to be undone if it fails
    most = int(place.config.max_model * 2**30) or memory().limit
    options = dump_options(place.config)
    port, data_port = endpoint.address.port, endpoint.data_port
    await endpoint.open(Servicer(parts, port=port, data_port=data_port, max_model=most, options=options))
    tasks = _start_tasks(parts, endpoint, health, shutdown)
    shutdown.listen_to_signals()
    # What is there by now stays: no collection has to look through torch again, a fifth of a second in which all wait.
    gc.collect()
    gc.freeze()
    _log_start(place, endpoint, http)
    on_ready(Ready(endpoint.address, http.address if http else None))
    await shutdown.wait()
    await _stop(parts, endpoint, shutdown, tasks, place.config.ready_file)
    shutdown.ignore_signals()


def _start_tasks(parts: Parts, endpoint: Endpoint, health: LoopHealth, shutdown: Shutdown) -> list[asyncio.Task[None]]:
    """Start what a shard does beside answering calls; one that fails ends the server."""
    work: list[Coroutine[Any, Any, None]] = [
        _work(parts),
        health.beat(),
        endpoint.watch_strangers(),
        parts.driver.tick(),
        parts.fence.watch(),
        parts.job.trace.keep(),
    ]
    if parts.lease is not None:
        work.append(parts.lease.hold())
    tasks = [asyncio.create_task(each) for each in work]
    for task in tasks:
        shutdown.watch(task)
    return tasks


async def _work(parts: Parts) -> None:
    """Be a standby until this server serves; then follow the lead, or be it: watch leases, plan checkpoints."""
    if parts.standby is not None:
        await parts.standby.run()
    if parts.lead is not None:
        await parts.lead.follow(parts.job)
        return
    if parts.standby is not None and parts.checkpointer is not None:
        parts.checkpointer.ownership.start_claiming()  # the checkpoints of the job are this server's to write now
    while True:
        await asyncio.sleep(tick_seconds(parts.job.settings.lease))
        parts.job.tick()
        if parts.checkpointer is not None:
            parts.checkpointer.plan()


async def _stop(
    parts: Parts, endpoint: Endpoint, shutdown: Shutdown, tasks: list[asyncio.Task[None]], ready_file: str
) -> None:
    """Write the last checkpoint and trace, tell workers, close the port, give up the seat."""
    index, failure = parts.job.settings.index, shutdown.failure
    log.info("shard %d stops", index)
    if parts.checkpointer is not None and failure is None:
        await parts.checkpointer.finish(lambda: show_work(ready_file))
    if parts.checkpointer is not None and parts.lead is None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                to_daemon_thread(parts.checkpointer.ownership.release, name="owner"), RELEASE_SECONDS
            )
    await parts.job.trace.finish()
    for task in tasks:
        task.cancel()
    other = bool(parts.replication_status.closed or parts.driver.seat.configuration.standby)
    parts.job.stop(last_word(index, shutdown.failure, standby=other), well=shutdown.failure is None and not other)
    await endpoint.close()
    if parts.lease is not None:
        await parts.lease.give_up()


def _serve_http(
    config: ServerConfig, metrics: Metrics, health: LoopHealth, refresh: Callable[[], None]
) -> HttpServer | None:
    """Serve /metrics and /health, unless they are off.

    Raises:
        ConfigError: The address cannot be bound.
    """
    if config.metrics == "off":
        return None
    wanted = address.parse(config.metrics, free_port=True)
    try:
        return HttpServer(wanted, metrics.registry, lambda: health.problem(time.monotonic()), refresh)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]  # asyncio repeats the address
        raise ConfigError(f"cannot serve metrics on {wanted}: {why}; choose another with --metrics, or off") from None


def _log_start(place: _Place, endpoint: Endpoint, http: HttpServer | None) -> None:
    config, settings = place.config, place.settings
    log.info(
        "shard %d of %d listens on %s, %s; mode %s, %d worker%s to start%s%s%s",
        settings.index,
        settings.num_shards,
        endpoint.address,
        endpoint.protection,
        settings.mode,
        config.workers,
        "" if config.workers == 1 else "s",
        f"; standby of {config.standby_of}" if config.standby_of else "",
        "" if settings.device == CPU else f"; parameters on {settings.device}",
        f"; metrics on http://{http.address}/metrics" if http else "",
    )
    endpoint.warn_unprotected()
