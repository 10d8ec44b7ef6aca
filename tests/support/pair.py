"""Two workers and a bystander's view: whatever a third one does, these two go on and every push of theirs counts.

The model is one vector under plain SGD with learning rate 1; each of the two pushes a gradient of ones, so in sync
mode x falls by exactly 1 a step.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from torch_ps.worker.runtime.access import access

SIZE = 8
SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)


def model() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(SIZE)}


class Pair:
    """The two workers, w0 and w1, of a synchronous job."""

    def __init__(self, servers: Servers, workers: list[torch_ps.Client]) -> None:
        self.servers, self.workers = servers, workers
        self.steps = 0

    def train(self, steps: int = 3) -> None:
        """Both push; checks that each step is applied exactly once."""
        for _ in range(steps):
            results = at_once(*(lambda w=worker: w.push({"x": torch.ones(SIZE)}) for worker in self.workers))
            self.steps += 1
            for result in results:
                assert result.params["x"].tolist() == [-self.steps] * SIZE
                assert result.contributors == tuple(worker.name for worker in self.workers)


@contextlib.contextmanager
def pair(
    *,
    lease: float = 15.0,
    shards: int = 1,
    timeout: float = 60.0,
    tls: torch_ps.Tls | None = None,
    token_file: str | None = None,
    **settings: Any,
) -> Iterator[Pair]:
    """``tls`` is that of the workers, ``token_file`` of all; ``settings`` are further options of the servers."""
    with (
        job(workers=2, lease=lease, shards=shards, token_file=token_file or "", **settings) as servers,
        torch_ps.Client(str(servers), name="w0", timeout=timeout, tls=tls, token_file=token_file) as first,
        torch_ps.Client(str(servers), name="w1", timeout=timeout, tls=tls, token_file=token_file) as second,
    ):
        servers.access = access(tls, token_file, None)
        for worker in (first, second):
            worker.init(model(), SPEC)
        found = Pair(servers, [first, second])
        found.train(1)
        yield found
