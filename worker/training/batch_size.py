"""``--batch-size auto``: finds the batch size for the device by trying powers of two before training.

    GPU   1, 2, 4, ... until one does not fit; takes the largest that leaves a part of the memory free
    CPU   1, 2, 4, ... until larger ones are no faster; takes the smallest with about the least time per sample

Rules of this file
  1. The search knows neither model nor device: a function tells whether a size fits, or how long it takes.
  2. The trial leaves parameters, buffers, gradients, random number generators and module modes as they were.
  3. Each worker searches before it joins, so sizes may differ within a job. A push is weighted by its samples, so the
     mean is still that over all samples. But the sampler of the ready-made tasks then partitions by each worker's own
     size: within an epoch two workers may get the same sample; over many epochs each sample is drawn equally often.

The learning rate is not changed: a much larger batch may need a larger one.

Source: McCandlish et al., arXiv:1812.06162, on why a batch larger than the device needs is no gain in itself.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker.runtime import device as devices
from torch_ps.worker.tasks import Task
from torch_ps.worker.training.precision import Precision

#: Largest size that is tried; fewest pushes that a size has to leave the job.
MOST, FEWEST_PUSHES = 1 << 16, 64
#: Share of the free GPU memory that stays free, for fragmentation, codecs and batches of other shapes.
HEADROOM = 0.2
#: A size counts as fastest if its time per sample is within this share of the fastest.
AS_FAST = 0.05
#: CPU: seconds of one step after which no larger size is tried; seconds that all repeats of one size may take.
LONGEST, REPEATING = 1.0, 0.2


def find_largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest of ``least``, 2 ``least``, ... up to ``most`` that fits; 0 if the first one does not."""
    found, size = 0, least
    while size <= most and fits(size):
        found, size = size, 2 * size
    return found


def find_fastest(seconds: Callable[[int], float], least: int, most: int) -> tuple[int, dict[int, float]]:
    """The smallest of ``least``, 2 ``least``, ... whose time per sample is about that of the fastest.

    The search stops two doublings after the fastest, or where one step takes ``LONGEST``.

    Returns:
        The size, and the seconds per sample of every size that was tried.
    """
    tried: dict[int, float] = {}
    size = least
    while size <= most:
        took = seconds(size)
        tried[size] = took / size
        best = min(tried, key=tried.__getitem__)
        if size >= 4 * best or took > LONGEST:
            break
        size *= 2
    return min(each for each, per in tried.items() if per <= (1 + AS_FAST) * min(tried.values())), tried


def largest_allowed(samples: int) -> int:
    """The largest power of two up to ``MOST`` with at least ``FEWEST_PUSHES`` pushes in ``samples``; at least 1."""
    return 1 << (max(1, min(MOST, samples // FEWEST_PUSHES)).bit_length() - 1)


def find_batch_size(task: Task, model: nn.Module, device: torch.device, config: WorkerConfig) -> tuple[int, str]:
    """The batch size for ``task`` on ``device``, and the reason, as a clause for the log.

    Args:
        task: source of batches and loss.
        model: model on ``device``, before the worker joins.
        device: CPU or GPU.
        config: samples, seed, precision and local steps of the worker.

    Raises:
        ConfigError: not even the smallest batch fits.
    """
    trial = _Trial(task, model, device, config)
    most = largest_allowed(config.samples)
    limit = f"; a larger one would leave fewer than {FEWEST_PUSHES} pushes of {config.samples} samples"
    with preserve_state(model, device):
        model.train()
        least = trial.least() if most > 1 else 1
        if device.type == "cuda":
            size = find_largest(trial.fits, least, most)
            free = f"{trial.free / 2**30:.1f} GiB"
            if not size:
                raise ConfigError(
                    f"batch_size auto: not even {least} samples fit into the free {free} of {device} with "
                    f"{HEADROOM:.0%} to spare; use a smaller model, --precision bf16, or give a number"
                )
            why = f"the largest power of two that leaves {HEADROOM:.0%} of the free {free} on {device}"
            return size, why + (limit if 2 * size > most else "")
        size, tried = find_fastest(trial.seconds, least, most)
        why = f"the fastest on the CPU with {1e3 * tried[size]:.3g} ms a sample"
        others = [each for each in (least, 4 * size) if each in tried and each != size]
        why += "".join(f", {each} takes {1e3 * tried[each]:.3g} ms" for each in others)
        return size, why + (limit if 2 * size > most else "")


class _Trial:
    """Runs forward and backward of one batch and measures it."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device, config: WorkerConfig) -> None:
        self._task, self._model, self._device, self._config = task, model, device, config
        self._precision = Precision(config.precision, device)
        self.free = 0

    def least(self) -> int:
        """Smallest batch size: 1, or 2 for a model that cannot train on a single sample, such as one with BatchNorm."""
        try:
            self._step(self._batch(1))
        except ValueError:
            return 2
        except torch.OutOfMemoryError:
            return 1  # ``fits`` finds the same, and the caller reports it
        finally:
            self._clean()
        return 1

    def seconds(self, size: int) -> float:
        """Seconds of the fastest of a few steps; other load on the machine only adds to a step."""
        batch = self._batch(size)
        took: list[float] = []
        self._step(batch)
        while len(took) < 2 or (len(took) < 8 and sum(took) < REPEATING):
            begin = time.perf_counter()
            self._step(batch)
            took.append(time.perf_counter() - begin)
            if took[0] > LONGEST:
                break
        return min(took)

    def fits(self, size: int) -> bool:
        """Whether the step fits in GPU memory and leaves the headroom."""
        self._clean()
        self.free = torch.cuda.mem_get_info(self._device)[0]
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        try:
            self._step(self._batch(size))
            torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError:
            return False
        except RuntimeError as error:
            if "ALLOC_FAILED" not in str(error):  # how cuBLAS and cuDNN report that memory is exhausted
                raise
            return False
        finally:
            self._clean()
        used = torch.cuda.max_memory_reserved(self._device) - before
        return used + self._inner_state() <= (1 - HEADROOM) * self.free

    def _inner_state(self) -> int:
        """Bytes that the inner optimizer of local steps may need; the trial does not run it."""
        if self._config.local_steps == 1:
            return 0
        return sum(2 * 4 * parameter.numel() for parameter in self._model.parameters())

    def _batch(self, size: int) -> Any:
        batches = iter(self._task.batches(0, 1, size, self._config.seed))
        for batch in batches:
            return devices.move(batch, self._device)
        raise ConfigError(f"batch_size auto: task {self._task.name!r} gives no batch of {size} samples; give a number")

    def _step(self, batch: Any) -> None:
        self._model.zero_grad(set_to_none=True)
        with self._precision.autocast():
            loss = self._task.loss(self._model, batch)
        torch.autograd.backward(loss)

    def _clean(self) -> None:
        self._model.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore ``model`` and the random number generators on exit, bit for bit.

    Modules keep the same tensor objects. The copies are in CPU memory, because GPU memory is being measured.
    """
    modules = [(module, module.training, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*model.parameters(), *model.buffers())]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    states = random.getstate(), np.random.get_state()
    for parameter, _ in gradients:
        parameter.grad = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, training, parameters, buffers in modules:
                module.training = training
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            with torch.no_grad():
                for tensor, copy in tensors:
                    tensor.copy_(copy)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            random.setstate(states[0])
            np.random.set_state(states[1])
