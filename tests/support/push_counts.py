"""Workers that see in the parameters how often each of their pushes was applied, while servers die and come back.

Each element counts the pushes of one worker: with a learning rate of 2**-10 and gradients of 1, x = -pushes / 1024.
``early`` is on the first shard, ``late`` on the last one, and of three shards the middle of ``padding`` on the second.
"""

import threading
from collections.abc import Callable

import torch

import torch_ps
from tests.support.jobs import until
from tests.support.restart import Shards
from tests.support.threads import at_once

LR = 2.0**-10
MODEL = {"early": torch.zeros(2), "padding": torch.zeros(512), "late": torch.zeros(2)}
MIDDLE = 256
#: Pushes of each worker, and after how many of them the fault comes.
STEPS, FAULT = 60, 20


class Counted(torch_ps.Client):
    """One of ``of`` workers that pushes 1 in its own elements and sees how often."""

    def __init__(self, servers: Shards, rank: int = 0, of: int = 1) -> None:
        super().__init__(str(servers), name=f"w{rank}", timeout=40)
        self.place, self.value = rank, float(of) if self.mode == "sync" else 1.0  # of which the mean is 1

    def begin(self) -> None:
        self.init(MODEL, torch_ps.OptimizerSpec("SGD", lr=LR))

    def count(self, params: dict[str, torch.Tensor]) -> list[float]:
        """In each bucket. As asynchronous checkpoints have it, one may lack the last push that another one has."""
        return [element.item() / -LR for element in self._elements(params)]

    def once(self) -> list[float]:
        gradient = {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}
        for element in self._elements(gradient):
            element.fill_(self.value)
        return self.count(self.push(gradient).params)

    def _elements(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [values["early"][self.place], values["padding"][MIDDLE + self.place], values["late"][self.place]]


def disturbed(servers: Shards, fault: Callable[[threading.Event], None]) -> None:
    """Two workers push ``STEPS`` times each, though in between they lose their servers once and go back.

    Args:
        fault: function called once both workers wait and a checkpoint is complete; its event lets them go on.
    """
    at, go = [threading.Event(), threading.Event()], threading.Event()

    def disturb() -> None:
        assert all(event.wait(60) for event in at)
        until(lambda: servers.status().checkpoint.version > 0, "a checkpoint is good")
        fault(go)

    with Counted(servers, 0, 2) as one, Counted(servers, 1, 2) as two:
        for client in (one, two):
            client.begin()
        restarts = at_once(lambda: _train(one, at[0], go), lambda: _train(two, at[1], go), disturb)[:2]
        assert restarts == [1, 1]
        with torch_ps.Client(str(servers)) as observer:
            params = observer.pull().params
        assert params["early"].tolist() == params["late"].tolist() == [-STEPS * LR] * 2


def _train(client: Counted, at: threading.Event, go: threading.Event) -> int:
    """Push until ``STEPS`` pushes are in all buckets; gives how often it had to begin again.

    A push counts once in each bucket: after a restart a bucket may know it already, from its ledger.
    """
    counts, restarts = [0.0] * 3, 0
    while min(counts) < STEPS:
        before = counts
        try:
            counts = client.once()
        except torch_ps.StepConflict:
            counts, restarts = client.count(client.pull().params), restarts + 1
            assert all(now <= then for now, then in zip(counts, before, strict=True)), (before, counts)
        else:
            assert counts == [max(then, min(before) + 1) for then in before], (before, counts)
        if min(counts) == FAULT and not at.is_set():
            at.set()
            assert go.wait(60)
    return restarts
