"""Samples that the lead gives out as workers need them: each is trained on once an epoch, though workers come and go.

    request --portion: positions in the epoch's order--> batches --> DataLoader --> training loop --> push covers them
     ^                                                      |
     +--- while there are more, without waiting ------------+
     +--- none now: the pass ends, what is gathered is pushed, the next request waits

Rules of this file
  1. The next push covers each batch that was handed to the training loop. It does not cover what a DataLoader has read
     ahead.
  2. A worker that waits for samples has pushed all that it has, so that every worker can finish the epoch.
  3. Samples that were given to an earlier session of this worker are skipped: other workers have them now.
  4. A loop that breaks off an epoch gives back what was read ahead at once. The batch that it has got last belongs to
     its next push; if it reads on without a push, this batch goes back too. An iteration of which nothing was pushed
     costs no epoch, as ``next(iter(loader))`` for a look at the data.
"""

import contextlib
import functools
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from torch_ps.common.errors import PsError, UnknownWorker, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.optim.companions import Companions, Pause
from torch_ps.worker.optim.optimizer import ParameterServerOptimizer

#: Seconds of the last request of a worker that has waited for samples for too long, which says why.
LAST_LOOK_SECONDS = 2.0
#: Attributes of a DataLoader that are those of the loader which collates the batches.
LOADER_OPTIONS = frozenset(
    {
        "collate_fn",
        "generator",
        "in_order",
        "multiprocessing_context",
        "num_workers",
        "persistent_workers",
        "pin_memory",
        "pin_memory_device",
        "prefetch_factor",
        "timeout",
        "worker_init_fn",
    }
)


@dataclass(slots=True)
class _Epochs:
    """Epochs of one data set that an optimizer has begun to read; a second ``shard`` of the same data goes on after.

    Attributes:
        begun: Number of epochs.
        last: Epochs that the last iteration has begun.
        broken_off: Life of the session and samples pushed when the last iteration began, if it was broken off.
    """

    begun: int = 0
    last: int = 0
    broken_off: tuple[int, int] | None = None


class _Reading:
    """What the iterations of one optimizer have in common: their epochs, and the weight that they set.

    While a loop reads, ``weight`` is the size of its batch. After it, the weight is what it was before: at once, or
    when the batch that the loop has got last is pushed.
    """

    def __init__(self, optimizer: ParameterServerOptimizer) -> None:
        self.epochs: defaultdict[bytes, _Epochs] = defaultdict(_Epochs)
        self._optimizer = weakref.ref(optimizer)
        self._num_open = 0
        self._weight = optimizer.weight
        self._after_step: Any = None  # handle of the hook

    def begin(self, optimizer: ParameterServerOptimizer) -> None:
        self._restore()
        if not self._num_open:
            self._weight = optimizer.weight
        self._num_open += 1

    def end(self, optimizer: ParameterServerOptimizer, *, pending: bool) -> None:
        """End one iteration; ``pending``: the next push takes the batch that it has given last."""
        self._num_open -= 1
        if self._num_open:
            return
        if pending:
            self._after_step = optimizer.register_step_post_hook(lambda *_: self._restore())
        else:
            optimizer.weight = self._weight

    def _restore(self) -> None:
        if self._after_step is not None:
            self._after_step.remove()
            self._after_step = None
            if (optimizer := self._optimizer()) is not None:
                optimizer.weight = self._weight


_readings: "weakref.WeakKeyDictionary[ParameterServerOptimizer, _Reading]" = weakref.WeakKeyDictionary()


def _reading_of(optimizer: ParameterServerOptimizer) -> _Reading:
    if optimizer not in _readings:
        _readings[optimizer] = _Reading(optimizer)
    return _readings[optimizer]


def order_of(size: int, *, shuffle: bool, seed: int) -> torch.Tensor:
    """The order of one epoch, the same on every worker; shape (size,), int64."""
    if not shuffle:
        return torch.arange(size, device="cpu")
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


class LeasedShard:
    """The batches of one worker, as many as it gets. Iterating again goes on with the epochs after.

    It has the attributes of a ``DataLoader`` that do not depend on a sampler: ``dataset``, ``batch_size``,
    ``drop_last``, ``num_workers``, ``collate_fn`` and the like.

    Args:
        dataset: map-style dataset.
        optimizer: optimizer of this worker.
        others: further optimizers of this worker that take part; see ``Companions``.
        size: samples in the dataset.
        batch_size: samples per batch; None gives the items of the dataset as they are.
        shuffle: whether each epoch has an order of its own; False keeps the order of the dataset.
        seed: seed of the order.
        epochs: epochs of one iteration.
        drop_last: whether batches of less than ``batch_size`` are left out.
        name: name of the dataset, where two in one job are equally long and have the same seed.
        loader: further arguments of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        optimizer: ParameterServerOptimizer,
        others: Sequence[ParameterServerOptimizer],
        size: int,
        *,
        batch_size: int | None,
        shuffle: bool,
        seed: int,
        epochs: int,
        drop_last: bool,
        name: str,
        loader: dict[str, Any],
    ) -> None:
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self._optimizer, self._session, self._others = optimizer, optimizer.session, others
        self._companions = Companions(optimizer, others)
        self._size, self._shuffle, self._seed, self._epochs = size, shuffle, seed, epochs
        self._set = pb.DataSet(name=name, size=self._size, seed=seed, shuffled=shuffle)
        self._batch, self.weighs = batch_size or 1, batch_size is not None
        self._until = 0  # epochs that are over when the current iteration ends
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64, device="cpu"), -1
        self._portion = pb.DataReply()
        self._key = self._set.SerializeToString(deterministic=True)
        self._pending: deque[tuple[int, int]] = deque()  # per batch that is read ahead: life, samples
        plan = _Plan(self)
        if loader.get("num_workers"):
            loader = {"persistent_workers": True, **loader}
        if batch_size is None:
            loader = {"batch_size": None, "sampler": plan, **loader}
        else:
            loader = {"batch_sampler": plan, **loader}
        self._new_loader: Callable[[], DataLoader[Any]] = functools.partial(DataLoader, dataset, **loader)
        self._loader = self._new_loader()  # now, so that a wrong argument is refused

    def __getattr__(self, name: str) -> Any:
        if name in LOADER_OPTIONS:
            return getattr(self._loader, name)
        if name in ("sampler", "batch_sampler"):
            raise AttributeError(
                f"torch_ps.shard has no {name}: the servers give out the samples, so none can be skipped or chosen by "
                "index; a job that resumes goes on with the samples that are left of its epoch by itself (Trainer: "
                "ignore_data_skip=True)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, for scripts that call it: the job counts the epochs, and each has an order of its own."""

    def __iter__(self) -> Iterator[Any]:
        self._companions = Companions(self._optimizer, self._others)  # of now: some may have been made or closed
        readings = {each: _reading_of(each) for each in self._companions.all}
        reading = readings[self._optimizer]
        epochs, counts = reading.epochs[self._key], self._session.sample_counts
        self._clear_up(epochs)
        epochs.begun, epochs.last = epochs.begun + self._epochs, self._epochs
        self._until = epochs.begun
        before = counts.life, counts.pushed(self._key)
        over = False
        for each in readings:
            readings[each].begin(each)
        # Of this iteration only: its processes end with it, not in whatever a garbage collection interrupts.
        loader = self._new_loader()
        try:
            while self._wait_for_portion():
                self._pending.clear()
                for batch in loader:
                    life, samples = self._pending.popleft()
                    if life != self._session.sample_counts.life:
                        continue  # other workers have its samples now
                    counts.start(self._key, samples)
                    if self.drop_last and samples < self._batch:
                        continue  # the next push covers it, without a gradient
                    if self.weighs:
                        self._companions.weigh(float(samples))
                    yield batch
            over = True
        finally:
            for each in readings:
                readings[each].end(each, pending=counts.pending(self._key))
            if self._session.number and not over:
                epochs.broken_off = before
                counts.give_up(self._key)
                self._give_back()

    def _clear_up(self, epochs: _Epochs) -> None:
        """After an iteration that was broken off: the batch that no push has taken goes back, and maybe the epochs."""
        counts, before, epochs.broken_off = self._session.sample_counts, epochs.broken_off, None
        if before is None:
            return
        if counts.pending(self._key) and not self._optimizer.gathered:
            counts.give_up_started(self._key)
            self._give_back()
        if before == (counts.life, counts.pushed(self._key)) and not counts.pending(self._key):
            epochs.begun -= epochs.last

    def _give_back(self) -> None:
        with contextlib.suppress(PsError):  # the job is over, or this worker was dropped, so they are free
            self._ask(give_back=True)

    def __len__(self) -> NoReturn:
        """Refuse, as torch does for data of unknown length; a wrong length would cut epochs short.

        Raises:
            TypeError: says what to count instead.
        """
        raise TypeError(
            "how many batches this worker gets depends on the others, so torch_ps.shard has no len(); a schedule "
            f"or a line of progress can go by optimizer.samples / {self._epochs * self._size}, the part that the whole "
            "job has trained on"
        )

    def _wait_for_portion(self) -> bool:
        """Push what has been gathered, then wait for samples; returns False when the epochs are over.

        Raises:
            WaitTimeout: says who has the samples that are left.
        """
        optimizer = self._optimizer
        while True:
            if optimizer.gathered or self._session.sample_counts.pending(self._key):
                optimizer.settle()
            optimizer.exit_if_requested()
            try:
                reply = self._ask(wait=True) if len(self._companions) == 1 else self._ask_and_help()
            except PsError as error:
                optimizer.exit_if_requested()
                if not isinstance(error, UnknownWorker):
                    raise
                optimizer.recover(error)
                continue
            if reply.answer == pb.DataReply.PORTION:
                self._portion = reply
                return True
            if reply.answer == pb.DataReply.OVER:
                return False
            optimizer.settle()

    def _ask_and_help(self) -> pb.DataReply:
        """Wait for samples, and meanwhile take part in the steps that others wait for this worker in.

        Raises:
            WaitTimeout: says who has the samples that are left.
        """
        pause, deadline = Pause(), time.monotonic() + self._session.timeout
        awaited: ParameterServerOptimizer | None = None
        while True:
            reply = self._ask()
            if reply.answer != pb.DataReply.LATER:
                return reply
            if awaited is not None:
                awaited.settle()
                pause, deadline = Pause(), time.monotonic() + self._session.timeout
            elif time.monotonic() > deadline:
                return self._ask_why()
            self._optimizer.exit_if_requested()
            awaited = self._companions.find_awaited()
            if awaited is None:
                pause.sleep()

    def _ask_why(self) -> pb.DataReply:
        """Ask once more, after a wait that was too long: the lead's error says who is waited for."""
        try:
            return self._ask(wait=True, seconds=LAST_LOOK_SECONDS)
        except WaitTimeout as error:
            why = str(error).partition(" s: ")[2]
            waited = f"worker {self._session.name!r} has waited for samples for {self._session.timeout:g} s"
            raise WaitTimeout(f"{waited}: {why}") from None

    def batches(self) -> Iterator[list[int]]:
        """Indices of the batches of one pass, beginning with the current portion."""
        while self._portion.range:
            life = self._session.sample_counts.life
            for indices in self._cut(self._portion):
                if life != self._session.sample_counts.life:
                    break
                self._pending.append((life, len(indices)))
                yield indices
            try:
                self._portion = self._ask()
            except UnknownWorker:
                return  # the training loop finds out at its step

    def _cut(self, portion: pb.DataReply) -> Iterator[list[int]]:
        """Batches of dataset indices; the last one may be shorter."""
        if portion.epoch != self._order_epoch:
            self._order = order_of(self._size, shuffle=self._shuffle, seed=self._seed + portion.epoch)
            self._order_epoch = portion.epoch
        mine = torch.cat([self._order[r.start : r.stop] for r in portion.range])
        for start in range(0, len(mine), self._batch):
            yield mine[start : start + self._batch].tolist()

    def _ask(self, *, wait: bool = False, give_back: bool = False, seconds: float | None = None) -> pb.DataReply:
        sample_counts = self._session.sample_counts
        reply = self._session.request_samples(
            pb.DataRequest(
                data=self._set,
                batch=self._batch,
                epochs=self._until,
                wait=wait,
                give_back=give_back,
                together=len(self._companions) > 1,
                received=sample_counts.received(self._key),
                number=sample_counts.number(self._key),
            ),
            seconds,
        )
        if reply.answer == pb.DataReply.PORTION:
            sample_counts.add_received(self._key, reply.number, sum(part.stop - part.start for part in reply.range))
        elif reply.answer == pb.DataReply.OVER:
            sample_counts.finish(self._key)
        return reply


class _Plan:
    """Sampler of a DataLoader for one pass: lists of indices, or single indices where the loader makes no batches."""

    def __init__(self, shard: LeasedShard) -> None:
        self._shard = shard

    def __iter__(self) -> Iterator[Any]:
        whole = self._shard.weighs
        for indices in self._shard.batches():
            yield indices if whole else indices[0]
