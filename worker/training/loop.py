"""The training loop of ready-made tasks: what ``ps-worker --task`` runs.

    while the job needs samples:  batch --> loss --> backward --> optimizer.step()     (events, snapshots)
    then:                         leave the job --> evaluate the snapshots --> generate a text

It is the loop that a user's script has, with events and evaluation around it; optimizer and servers know none of that.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_ps.common.devices import choose
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker import tasks
from torch_ps.worker.optim.optimizer import ParameterServerOptimizer
from torch_ps.worker.runtime import device as devices
from torch_ps.worker.runtime.access import tls_in
from torch_ps.worker.tasks import Task
from torch_ps.worker.training import batch_size
from torch_ps.worker.training.event_log import EventLog
from torch_ps.worker.training.precision import Precision
from torch_ps.worker.training.progress import ProgressDisplay
from torch_ps.worker.training.snapshots import Snapshots
from torch_ps.worker.training.tensorboard import TensorBoard

log = logging.getLogger("torch_ps.worker")

#: Consecutive steps without a finite gradient after which training ends; a GradScaler may need some tens to settle.
MOST_NOT_FINITE = 100


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """What a worker has built and checked before it joins the job."""

    config: WorkerConfig
    task: Task
    model: nn.Module
    device: torch.device
    lr: float
    batch_size: int
    batch_size_reason: str = ""


def prepare(config: WorkerConfig, local_rank: int = 0) -> TrainingSetup:
    """Build the task and its model; with ``batch_size=auto``, find the batch size.

    Args:
        config: options of the worker.
        local_rank: index of this worker among those on its host; selects its GPU.

    Raises:
        ConfigError: task, data or device do not exist, or no batch fits.
    """
    device = choose(config.device, local_rank)
    task = tasks.load(config.task, config.data)
    torch.manual_seed(config.seed)
    model = task.model().to(device)
    if config.batch_size == "auto":
        size, reason = batch_size.find_batch_size(task, model, device, config)
        log.info("batch size auto: %d, %s", size, reason)
    else:
        size, reason = config.batch_size or task.default_batch_size, ""
    return TrainingSetup(config, task, model, device, config.lr or task.default_lr, size, reason)


def train(setup: TrainingSetup) -> None:
    """Train until the job has absorbed ``config.samples`` samples; then rank 0 evaluates the model.

    Raises:
        PsError: the servers refuse the worker or its options, or cannot be reached.
    """
    config, model = setup.config, setup.model
    with TensorBoard(config.tensorboard, config.name) as board, EventLog(config.events, board) as events:
        optimizer = ParameterServerOptimizer(
            setup.task.optimizer(model, setup.lr),
            model,
            config.servers or None,
            job=config.job or None,
            name=config.name or None,
            rank=config.rank,
            compress=config.compress,
            compress_pull=config.compress_pull,
            feedback=config.feedback,
            compress_warmup=config.compress_warmup,
            momentum_correction=config.momentum_correction,
            buffers=config.buffers,
            accumulate=config.accumulate,
            local_steps=config.local_steps,
            outer_lr=config.outer_lr,
            outer_momentum=config.outer_momentum,
            overlap=_overlap(config),
            plane=config.plane,
            connections=config.connections,
            tls=tls_in(config),
            token_file=config.token_file,
            timeout=config.timeout,
        )
        with optimizer:
            snapshots = _loop(setup, optimizer, events)
        if snapshots is not None:
            _evaluate(setup, snapshots, events)


def _overlap(config: WorkerConfig) -> str:
    """The overlap of the loop below, which leaves gradients, weights and hyperparameters alone from backward to step.

    A GradScaler does not: it scales the gradients.
    """
    eager = config.overlap == "auto" and config.precision != "fp16" and config.local_steps == 1
    return "eager" if eager else config.overlap


def _loop(setup: TrainingSetup, optimizer: ParameterServerOptimizer, events: EventLog) -> Snapshots | None:
    """Train. Returns the snapshots on rank 0, None on other workers."""
    config, task, model = setup.config, setup.task, setup.model
    rank, world = optimizer.rank, optimizer.world  # waits until the first step may start
    batches = iter(task.batches(rank, world, setup.batch_size, config.seed))
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    _report_start(setup, optimizer, rank, world, events)
    snapshots = Snapshots(model, config.samples, config.evaluations if rank == 0 else 0)
    snapshots.copy_if_due(0)
    precision = Precision(config.precision, setup.device, config.accumulate)
    passes = config.accumulate * config.local_steps  # per push
    step, samples, spent, begin, waited = 0, 0, 0.0, time.monotonic(), optimizer.wait_seconds
    with ProgressDisplay(config.samples) as display:
        while optimizer.samples < config.samples:
            if config.slow > 1:
                time.sleep((config.slow - 1) * spent)  # before the gradient, so its staleness is that of a slow worker
            start = time.monotonic()
            # Unpushed local steps of other workers are unknown; assume as many as this worker has.
            reached = optimizer.samples + world * optimizer.unpushed
            factor = task.schedule(min(1.0, reached / config.samples))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            batch = devices.move(_next_batch(batches, task), setup.device)
            number = devices.samples_of(batch)
            optimizer.weight = number  # before backward, because buckets are sent during it
            with precision.autocast():
                loss = task.loss(model, batch)
            precision.backward(loss)
            if config.slow > 1 and setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
            spent = time.monotonic() - start
            precision.step(optimizer)
            optimizer.zero_grad()
            step, samples, job = step + 1, samples + number, round(optimizer.samples)
            value, wait, pushed = loss.item(), optimizer.wait_seconds - waited, step % passes == 0
            events.write(
                "step",
                time=time.time(),
                step=step,
                samples=samples,
                job_samples=job,
                loss=value,
                lr=rates[0] * factor,
                staleness=optimizer.staleness if pushed else None,
                version=optimizer.version,
                pushed_bytes=optimizer.pushed_bytes,
                pulled_bytes=optimizer.pulled_bytes,
                wait_seconds=wait,
            )
            if pushed:  # between pushes the model has local steps that the job does not have
                snapshots.copy_if_due(job)
            display.show(step, job, value, wait)
            if optimizer.left_out_in_a_row >= MOST_NOT_FINITE:
                log.error(
                    "no finite gradient in %d steps: training has diverged and ends here; try a lower learning rate",
                    MOST_NOT_FINITE,
                )
                break
    traffic = {"pushed_bytes": optimizer.pushed_bytes, "pulled_bytes": optimizer.pulled_bytes}
    events.write("end", time=time.time(), steps=step, samples=samples, **traffic, status="ok")
    log.info(
        "trained %d steps, %d samples in %.1f s, of which %.1f s waiting; pushed %.1f MB, pulled %.1f MB",
        step, samples, time.monotonic() - begin, optimizer.wait_seconds - waited,
        traffic["pushed_bytes"] / 1e6, traffic["pulled_bytes"] / 1e6,
    )  # fmt: skip
    return snapshots if rank == 0 else None


def _next_batch(batches: Iterator[Any], task: Task) -> Any:
    for batch in batches:
        return batch
    raise ConfigError(f"task {task.name!r}: batches() has ended; it must yield batches as long as the job trains")


def _report_start(
    setup: TrainingSetup, optimizer: ParameterServerOptimizer, rank: int, world: int, events: EventLog
) -> None:
    config = setup.config
    parameters = sum(parameter.numel() for parameter in setup.model.parameters())
    log.info(
        "rank %d of %d, %s, on %s: task %s, %s parameters, batch size %d, learning rate %g",
        rank, world, optimizer.mode, setup.device,
        setup.task.name, f"{parameters:,}", setup.batch_size, setup.lr,
    )  # fmt: skip
    settings = {
        "data": config.data,
        "samples": config.samples,
        "batch_size": setup.batch_size,
        "batch_size_reason": setup.batch_size_reason,
        "lr": setup.lr,
        "precision": config.precision,
        "seed": config.seed,
        "compress": config.compress,
        "compress_pull": config.compress_pull,
        "accumulate": config.accumulate,
        "local_steps": config.local_steps,
        "outer_lr": config.outer_lr,
        "outer_momentum": config.outer_momentum,
        "overlap": config.overlap,
        "slow": config.slow,
        "threads": config.threads,
    }
    events.write(
        "start",
        time=time.time(),
        name=optimizer.name,
        rank=rank,
        world=world,
        mode=optimizer.mode,
        device=str(setup.device),
        task=setup.task.name,
        parameters=parameters,
        settings=settings,
    )


def _evaluate(setup: TrainingSetup, snapshots: Snapshots, events: EventLog) -> None:
    """Write the validation curve to the event log, log its last point, and print a text if the model generates one."""
    metrics: dict[str, float] = {}
    for snapshot, metrics in snapshots.evaluate(setup.task):  # the last metrics are used below
        events.write("evaluation", time=snapshot.time, job_samples=snapshot.samples, metrics=metrics)
    if not metrics:
        return
    log.info("validation: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    with torch.inference_mode():
        text = setup.task.sample(setup.model)
    if text is not None:
        events.write("sample", text=text)
        sys.stdout.write("\n".join(["the model writes:", *("    " + line for line in text.splitlines())]) + "\n")
        sys.stdout.flush()
