"""``--batch-size auto``: the batch size that suits the device, found by trying powers of two before training.

    GPU   1, 2, 4, ... until one does not fit: the largest that leaves a part of the memory free
    CPU   1, 2, 4, ... until larger ones are no faster: the smallest that takes about the least time per sample

Rules of this file
  1. The search knows neither model nor device: it asks a function whether a size fits, or what it takes.
  2. Training is not disturbed: parameters, buffers, gradients, random numbers and modes are afterwards what they were.
  3. Each worker tries for itself, before it joins, so sizes may differ within a job. A push weighs as many samples as
     it holds, and the mean is still that over all samples. But the ready-made streams then deal by each worker's own
     size: within an epoch two workers may get the same sample; over epochs each sample is drawn equally often.

The learning rate stays what it is: a much larger batch may want a larger one.

Source: McCandlish et al., arXiv:1812.06162, for why a batch larger than the device needs is no gain in itself.
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
from torch_ps.common.options.config import WorkerConfig
from torch_ps.worker.runtime import device as devices
from torch_ps.worker.tasks import Task
from torch_ps.worker.training.precision import Precision

#: No size above it is tried; and none that would leave a job fewer pushes than this.
MOST, FEWEST_PUSHES = 1 << 16, 64
#: Part of the GPU's free memory that stays free: fragments, codecs, batches of other shapes.
HEADROOM = 0.2
#: A size that takes this much longer per sample than the fastest is as fast.
AS_FAST = 0.05
#: Seconds of one step above which no larger size is tried on a CPU, and that all repeats of one size may take.
LONGEST, REPEATING = 1.0, 0.2


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest of ``least``, 2 ``least``, ... up to ``most`` that fits; 0 if the first one does not."""
    found, size = 0, least
    while size <= most and fits(size):
        found, size = size, 2 * size
    return found


def fastest(seconds: Callable[[int], float], least: int, most: int) -> tuple[int, dict[int, float]]:
    """The smallest of ``least``, 2 ``least``, ... that is about as fast per sample as the fastest of them.

    Stops two doublings after the fastest, or where one step takes ``LONGEST``.

    Returns:
        size, and the seconds per sample of every size that was tried.
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


def bound(samples: int) -> int:
    """The largest power of two that leaves a job of ``samples`` its fewest pushes, within 1 and ``MOST``."""
    return 1 << (max(1, min(MOST, samples // FEWEST_PUSHES)).bit_length() - 1)


def find(task: Task, model: nn.Module, device: torch.device, config: WorkerConfig) -> tuple[int, str]:
    """The batch size for ``task`` on ``device``, and why, as the end of a sentence.

    Args:
        task: source of batches and the loss.
        model: model on ``device``, not yet trained or joined.
        device: CPU or GPU.
        config: samples, seed, precision and local steps are read.

    Raises:
        ConfigError: not even the smallest batch fits.
    """
    trial = _Trial(task, model, device, config)
    most = bound(config.samples)
    limit = f"; a larger one would leave fewer than {FEWEST_PUSHES} pushes of {config.samples} samples"
    with unchanged(model, device):
        model.train()
        least = trial.least() if most > 1 else 1
        if device.type == "cuda":
            size = largest(trial.fits, least, most)
            free = f"{trial.free / 2**30:.1f} GiB"
            if not size:
                raise ConfigError(
                    f"batch_size auto: not even {least} samples fit into the free {free} of {device} with "
                    f"{HEADROOM:.0%} to spare; use a smaller model, --precision bf16, or give a number"
                )
            why = f"the largest power of two that leaves {HEADROOM:.0%} of the free {free} on {device}"
            return size, why + (limit if 2 * size > most else "")
        size, tried = fastest(trial.seconds, least, most)
        why = f"the fastest on the CPU with {1e3 * tried[size]:.3g} ms a sample"
        others = [each for each in (least, 4 * size) if each in tried and each != size]
        why += "".join(f", {each} takes {1e3 * tried[each]:.3g} ms" for each in others)
        return size, why + (limit if 2 * size > most else "")


class _Trial:
    """Forward and backward of one batch."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device, config: WorkerConfig) -> None:
        self._task, self._model, self._device, self._config = task, model, device, config
        self._precision = Precision(config.precision, device)
        self.free = 0

    def least(self) -> int:
        """1, or 2 for a model that cannot train on a single sample, as BatchNorm may not."""
        try:
            self._step(self._batch(1))
        except ValueError:
            return 2
        except torch.OutOfMemoryError:
            return 1  # ``fits`` finds the same, and says it
        finally:
            self._clean()
        return 1

    def seconds(self, size: int) -> float:
        """Of the fastest of a few steps: what else the machine does only adds to it."""
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
        """Whether the GPU's memory holds the step and leaves its headroom."""
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
            if "ALLOC_FAILED" not in str(error):  # how cuBLAS and cuDNN say that memory is out
                raise
            return False
        finally:
            self._clean()
        used = torch.cuda.max_memory_reserved(self._device) - before
        return used + self._inner_state() <= (1 - HEADROOM) * self.free

    def _inner_state(self) -> int:
        """Bytes that an optimizer on the worker may need, which the trial does not make."""
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
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever is done with ``model`` inside, afterwards it is what it was, to the bit; and so are the random numbers.

    Modules keep their very tensors. The copies are in the CPU's memory, as the GPU's is what is being measured.
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
