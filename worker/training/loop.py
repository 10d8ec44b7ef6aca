"""The training loop of ready-made tasks: what ``ps-worker --task`` runs.

    while the job needs samples:  batch --> loss --> backward --> optimizer.step()     (events, snapshots)
    then:                         leave the job --> measure the snapshots --> write a text

It is the loop that users write, with measuring around it: nothing here is known to the optimizer or the servers.
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
from torch_ps.common.options.config import WorkerConfig
from torch_ps.worker import tasks
from torch_ps.worker.optim.optimizer import ParameterServerOptimizer
from torch_ps.worker.runtime import device as devices
from torch_ps.worker.runtime.access import tls_in
from torch_ps.worker.tasks import Task
from torch_ps.worker.training import batch_size
from torch_ps.worker.training.event_log import Events
from torch_ps.worker.training.precision import Precision
from torch_ps.worker.training.progress import Display
from torch_ps.worker.training.snapshots import Snapshots
from torch_ps.worker.training.tensorboard import Board

log = logging.getLogger("torch_ps.worker")

#: Steps in a row without a finite gradient after which nothing more is to be expected; a GradScaler needs some tens.
MOST_LEFT_OUT = 100


@dataclass(frozen=True, slots=True)
class Setting:
    """What one worker needs before it joins: all that can be wrong without a server is checked by now."""

    config: WorkerConfig
    task: Task
    model: nn.Module
    device: torch.device
    lr: float
    batch_size: int
    batch_size_reason: str = ""


def prepare(config: WorkerConfig, local_rank: int = 0) -> Setting:
    """Build the task and its model, and find the batch size where it is to be found.

    Args:
        config: task, data, device, seed and what decides a batch's size and cost are read.
        local_rank: place of this worker among those of its host.

    Raises:
        ConfigError: no such task, data or device.
    """
    device = choose(config.device, local_rank)
    task = tasks.load(config.task, config.data)
    torch.manual_seed(config.seed)
    model = task.model().to(device)
    if config.batch_size == "auto":
        size, reason = batch_size.find(task, model, device, config)
        log.info("batch size auto: %d, %s", size, reason)
    else:
        size, reason = config.batch_size or task.default_batch_size, ""
    return Setting(config, task, model, device, config.lr or task.default_lr, size, reason)


def train(setting: Setting) -> None:
    """Train until the job has absorbed ``config.samples`` samples; then rank 0 measures the model.

    Raises:
        PsError: what the servers or the options refuse.
    """
    config, model = setting.config, setting.model
    with Board(config.tensorboard, config.name) as board, Events(config.events, board) as events:
        optimizer = ParameterServerOptimizer(
            setting.task.optimizer(model, setting.lr),
            model,
            config.servers or None,
            name=config.name or None,
            rank=config.rank,
            compress=config.compress,
            compress_pull=config.compress_pull,
            feedback=config.feedback,
            compress_warmup=config.compress_warmup,
            momentum_correction=config.momentum_correction,
            accumulate=config.accumulate,
            local_steps=config.local_steps,
            outer_lr=config.outer_lr,
            outer_momentum=config.outer_momentum,
            overlap=config.overlap,
            plane=config.plane,
            tls=tls_in(config),
            token_file=config.token_file,
            timeout=config.timeout,
        )
        with optimizer:
            snapshots = _loop(setting, optimizer, events)
        if snapshots is not None:
            _measure(setting, snapshots, events)


def _loop(setting: Setting, optimizer: ParameterServerOptimizer, events: Events) -> Snapshots | None:
    """Train. Returns the snapshots of rank 0, None elsewhere."""
    config, task, model = setting.config, setting.task, setting.model
    rank, world = optimizer.rank, optimizer.world  # waits until the first step may start
    batches = iter(task.batches(rank, world, setting.batch_size, config.seed))
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    _started(setting, optimizer, rank, world, events)
    snapshots = Snapshots(model, config.samples, config.evaluations if rank == 0 else 0)
    snapshots.look(0)
    precision = Precision(config.precision, setting.device, config.accumulate)
    passes = config.accumulate * config.local_steps  # per push
    step, samples, spent, begin, waited = 0, 0, 0.0, time.monotonic(), optimizer.wait_seconds
    with Display(config.samples) as display:
        while optimizer.samples < config.samples:
            if config.slow > 1:
                time.sleep((config.slow - 1) * spent)  # before the gradient, so that it is as stale as a slow worker's
            start = time.monotonic()
            # The others' local steps are not known before they are pushed; they are taken to be as many as one's own.
            reached = optimizer.samples + world * optimizer.unpushed
            factor = task.schedule(min(1.0, reached / config.samples))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            batch = devices.move(_next(batches, task), setting.device)
            number = devices.samples_of(batch)
            optimizer.weight = number  # before backward, during which buckets leave
            with precision.autocast():
                loss = task.loss(model, batch)
            precision.backward(loss)
            if config.slow > 1 and setting.device.type == "cuda":
                torch.cuda.synchronize(setting.device)
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
            if pushed:  # before that the model is this worker's own, not the job's
                snapshots.look(job)
            display.show(step, job, value, wait)
            if optimizer.left_out_in_a_row >= MOST_LEFT_OUT:
                log.error("no finite gradient in %d steps: the training has diverged and ends here", MOST_LEFT_OUT)
                break
    traffic = {"pushed_bytes": optimizer.pushed_bytes, "pulled_bytes": optimizer.pulled_bytes}
    events.write("end", time=time.time(), steps=step, samples=samples, **traffic, status="ok")
    log.info(
        "trained %d steps, %d samples in %.1f s, of which %.1f s waiting; pushed %.1f MB, pulled %.1f MB",
        step, samples, time.monotonic() - begin, optimizer.wait_seconds - waited,
        traffic["pushed_bytes"] / 1e6, traffic["pulled_bytes"] / 1e6,
    )  # fmt: skip
    return snapshots if rank == 0 else None


def _next(batches: Iterator[Any], task: Task) -> Any:
    for batch in batches:
        return batch
    raise ConfigError(f"task {task.name!r}: batches() came to an end; it has to go on as long as the job does")


def _started(setting: Setting, optimizer: ParameterServerOptimizer, rank: int, world: int, events: Events) -> None:
    config = setting.config
    parameters = sum(parameter.numel() for parameter in setting.model.parameters())
    log.info(
        "rank %d of %d, %s, on %s: task %s, %s parameters, batch size %d, learning rate %g",
        rank, world, optimizer.mode, setting.device,
        setting.task.name, f"{parameters:,}", setting.batch_size, setting.lr,
    )  # fmt: skip
    settings = {
        "data": config.data,
        "samples": config.samples,
        "batch_size": setting.batch_size,
        "batch_size_reason": setting.batch_size_reason,
        "lr": setting.lr,
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
        device=str(setting.device),
        task=setting.task.name,
        parameters=parameters,
        settings=settings,
    )


def _measure(setting: Setting, snapshots: Snapshots, events: Events) -> None:
    """The curve, its last point on the log, and a text where the model writes one."""
    metrics: dict[str, float] = {}
    for snapshot, metrics in snapshots.evaluate(setting.task):  # the last ones are used below
        events.write("evaluation", time=snapshot.time, job_samples=snapshot.samples, metrics=metrics)
    if not metrics:
        return
    log.info("validation: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    with torch.inference_mode():
        text = setting.task.sample(setting.model)
    if text is not None:
        events.write("sample", text=text)
        sys.stdout.write("\n".join(["the model writes:", *("    " + line for line in text.splitlines())]) + "\n")
        sys.stdout.flush()
