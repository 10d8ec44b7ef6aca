"""The same loop with servers: real ones, and as many workers as are wanted, compared with plain torch line by line.

plane    memory     gradients and parameters in memory that worker and server share
         unix       messages over a Unix socket, where no memory can be shared
         network    messages over gRPC
"""

import contextlib
import resource
import threading
from functools import cache, lru_cache
from typing import Any

import torch

import torch_ps
from tests.loops.observed import Look, Moment, differences, end, first_difference, nothing, observe
from tests.loops.plain import make, plain_torch
from tests.loops.registry import Kind
from tests.loops.run import Run
from tests.support.jobs import job
from tests.support.threads import at_once

PLANES = ("memory", "network", "unix")
OVERLAPS = ("auto", "on", "forward", "eager")
#: MiB of a bucket: a model of some hundred parameters has several.
BUCKET_SIZE = 2**-10
#: Seconds that a worker waits for the other one.
TIMEOUT = 30.0


class _NoSharedMemory:
    """While it is entered, on any thread, no memory can be shared: no file may grow, not even one in memory."""

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            self._set(0)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                self._set(resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    @staticmethod
    def _set(most: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


no_shared_memory = _NoSharedMemory()


STALE = "needed for gradient computation"
#: Ends a line after which there is no look, so that nothing is kept alive and nobody waits for a value.
UNSEEN = "# unseen"


@cache
def look_of(overlap: str) -> Look:
    """Lines after which the model may be read without changing what is tested.

    With "forward" reading waits for parameters, so the model is read when they have been used; with "eager" they may
    come while backward runs, so it is read after ``step``.
    """
    wanted = "backward(" if "forward" in overlap else "step(" if "eager" in overlap else ""
    return lambda line: wanted in line and not line.endswith(UNSEEN)


@lru_cache(maxsize=8)
def _plain(kind: Kind, num_workers: int, wanted: Look) -> list[list[Moment]]:
    """The same for every plane."""
    return plain_torch(kind, num_workers, wanted)


def compare(
    kind: Kind, plane: str, overlap: str, num_workers: int, *, shards: int = 1, is_observed: bool = True
) -> str:
    """Run a loop with servers and compare with plain torch.

    Args:
        kind: the loop.
        plane: one of ``PLANES``.
        overlap: the worker's option.
        num_workers: workers of a synchronous job.
        shards: servers.
        is_observed: whether there is a look after each line that ``look_of`` names, not only after the last one.

    Returns:
        "equal", "refused: WORDS", or where the two part.
    """
    observed = is_observed and kind.is_observed
    look = look_of(overlap) if observed else nothing
    expected = _plain(kind, num_workers, look)
    made = [make(kind) for _ in range(num_workers)]
    with job(workers=num_workers, shards=shards, bucket_size=BUCKET_SIZE) as servers:

        def one(rank: int) -> str:
            model, optimizer = made[rank]
            options: dict[str, Any] = {"overlap": overlap, "rank": rank, "name": f"w{rank}", "timeout": TIMEOUT}
            with no_shared_memory if plane == "unix" else contextlib.nullcontext():
                plane_ = "auto" if plane == "unix" else plane
                wrapped = torch_ps.ParameterServerOptimizer(
                    optimizer, model, str(servers), plane=plane_, **options, **kind.options
                )
            with wrapped:
                run = Run(model, wrapped, rank, num_workers, is_plain=False)
                if num_workers == 1:
                    torch.manual_seed(2)
                moments, error = observe(kind.loop, run, look)
                if error is not None:
                    return _refused(run, error, moments, expected[rank])
                wrapped.wait()
                return _stale(expected[rank], [*moments, end(run)]) or first_difference(
                    expected[rank], [*moments, end(run)], gradients=kind.same_gradients
                )

        try:
            found = at_once(*(lambda rank=rank: one(rank) for rank in range(num_workers)))
        except torch_ps.PsError as error:  # the optimizer is refused before there is a loop
            return f"refused: {error}"
    said = [each for each in found if each.startswith("refused")] + [each for each in found if each]
    return said[0] if said else "equal"


def _stale(expected: list[Moment], moments: list[Moment]) -> str:
    """Words of torch's own error that a graph is stale, where the first difference is that a worker raises it.

    What other workers step is not known before a step ends, so parameters count as written to that none has stepped.
    """
    for plain, served in zip(expected, moments, strict=False):
        if differences(plain.values, served.values):
            said = served.values.get("note said", "")
            is_stale = STALE in said and said != plain.values.get("note said")
            return f"refused: {said}" if is_stale and plain.line == served.line else ""
    return ""


def _refused(run: Run, error: BaseException, moments: list[Moment], expected: list[Moment]) -> str:
    """Words of an error before which nothing was applied, or what had been."""
    if not isinstance(error, torch_ps.PsError):
        return f"{type(error).__name__}: {error}"
    if found := first_difference(expected[: len(moments)], moments):
        return f"{found}; then {error}"
    if moments:
        names = [name for name, _ in [*run.model.named_parameters(), *run.model.named_buffers()]]
        now = {name: value for name, value in end(run).values.items() if name in names}
        before = {name: moments[-1].values[name] for name in names}
        if found_ := differences(before, now):
            return f"{', '.join(found_)} changed by what was refused: {error}"
    return f"refused: {error}"
