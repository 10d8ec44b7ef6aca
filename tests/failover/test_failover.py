"""A primary is killed in the middle of a synchronous step: its workers go on with the standby, and no bit differs."""

import signal
import threading
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.checkpoint.test_resume import adamw, fused_sgd, sgd
from tests.support.jobs import SECONDS, until
from tests.support.leased import EPOCHS, SIZE, Told, train_leased
from tests.support.replicated import Replicated, replicated
from tests.support.restart import shards
from tests.support.threads import at_once
from tests.support.training import Experts, backward, conv, mlp, same, seeded

STEPS, FAULT = 16, 6
NEVER = 10**6

#: Model, optimizer, options of the workers.
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd with momentum": (mlp, sgd, {}),
    "adamw, fp16 pushes": (mlp, adamw, {"compress": "fp16"}),
    "adamw, network": (mlp, adamw, {"plane": "network"}),
    "adamw, int8 pulls": (mlp, adamw, {"compress_pull": "int8"}),
    "sgd, sign both ways": (mlp, sgd, {"compress": "sign", "compress_pull": "sign"}),
    "adamw, buffers": (conv, adamw, {}),
    "fused sgd, experts without a gradient": (Experts, fused_sgd, {"plane": "network"}),
}


def train(
    servers: str, model: nn.Module, rank: int, make: Any, options: dict[str, Any], half: "Half | None" = None
) -> None:
    """``STEPS`` steps of one worker; at step ``FAULT`` the second worker pushes only when the fault has happened."""
    with torch_ps.ParameterServerOptimizer(make(model), model, servers, name=f"w{rank}", **options) as optimizer:
        while optimizer.version < STEPS:
            backward(model, optimizer.version, rank)
            if half is not None and optimizer.version == FAULT:
                half.reach(rank)
            optimizer.step()
            optimizer.zero_grad()


class Half:
    """The middle of a step: one of two workers has pushed it, the other one waits for the fault."""

    def __init__(self, servers: Replicated) -> None:
        self._servers, self._reached, self._over = servers, threading.Event(), threading.Event()

    def reach(self, rank: int) -> None:
        if rank:
            self._reached.set()
            assert self._over.wait(SECONDS)
        else:
            assert self._reached.wait(SECONDS)  # so that both have all of the step before

    def kill(self, *victims: int) -> None:
        """Wait for it, and until the first worker's push is there; then kill these primaries."""
        assert self._reached.wait(SECONDS)
        until(lambda: self._servers.paired(), "every shard has its standby")
        until(self._pushed, "a worker waits for the other one")
        self._servers.kill(*victims)
        self._over.set()

    def _pushed(self) -> bool:
        return all(
            any(w.waiting_seconds for w in self._servers.status(each).worker) for each in self._servers.primaries
        )


def undisturbed(case: str, num_shards: int) -> nn.Module:
    make_model, make, options = CASES[case]
    with shards(num_shards, workers=2, bucket_size=0.002) as servers:
        models = [seeded(make_model) for _ in range(2)]
        at_once(*(lambda r=r, m=m: train(str(servers), m, r, make, options) for r, m in enumerate(models)))
    assert same(*models)
    return models[0]


@pytest.mark.parametrize(
    ("case", "num_shards", "victims"),
    [(case, 1, (0,)) for case in CASES]
    + [("adamw, fp16 pushes", 2, (0,)), ("adamw, fp16 pushes", 2, (1,)), ("sgd with momentum", 3, (0, 2))],
)
def test_kill_in_the_middle_of_a_step_changes_no_bit(case: str, num_shards: int, victims: tuple[int, ...]) -> None:
    whole = undisturbed(case, num_shards)
    make_model, make, options = CASES[case]
    with replicated(num_shards, workers=2, bucket_size=0.002) as servers:
        half, models = Half(servers), [seeded(make_model) for _ in range(2)]
        at_once(
            *(lambda r=r, m=m: train(str(servers), m, r, make, options, half) for r, m in enumerate(models)),
            lambda: half.kill(*victims),
        )
        for shard in victims:
            assert servers.status(servers.standbys[shard]).version == STEPS
    assert all(same(model, whole) for model in models)


@pytest.mark.parametrize("victims", [(0,), (1,)])
def test_leased_samples_and_bits_are_those_of_a_job_that_lost_no_server(victims: tuple[int, ...]) -> None:
    with shards(2, workers=2, bucket_size=0.002) as alone:
        whole = train_leased(str(alone), adamw, NEVER)
    with replicated(2, workers=2, bucket_size=0.002) as servers:

        def fault() -> None:
            servers.wait()
            until(lambda: servers.status(servers.primaries[0]).version >= 4, "training is under way")
            servers.kill(*victims)

        told: list[Told] = []
        at_once(lambda: told.extend(train_leased(str(servers), adamw, NEVER, pause=0.05)), fault)
    assert Counter(chain(*chain(*(each.samples for each in told)))) == {i: EPOCHS for i in range(SIZE)}
    for each, other in zip(told, whole, strict=True):
        assert each.samples == other.samples
        assert each.losses == other.losses
        assert same(each.model, other.model)


def test_worker_that_comes_later_finds_the_standby_by_its_address() -> None:
    with replicated(workers=1) as servers:
        both = f"{servers}|{servers.standbys[0].address}"
        with torch_ps.Client(both, name="w0") as client:
            client.init({"x": torch.ones(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
            servers.wait()
            servers.kill(0)
            until(lambda: servers.role(servers.standbys[0]) == "alone", "the standby serves")
            with torch_ps.Client(both) as late:
                assert late.pull().version == client.pull().version


def test_primary_that_is_stopped_with_sigterm_hands_over() -> None:
    whole = undisturbed("sgd with momentum", 1)
    make_model, make, options = CASES["sgd with momentum"]
    with replicated(1, workers=2, bucket_size=0.002) as servers:
        half, models = Half(servers), [seeded(make_model) for _ in range(2)]
        servers.kill = lambda *_: servers.primaries[0].process.send(signal.SIGTERM)  # type: ignore[method-assign]
        at_once(
            *(lambda r=r, m=m: train(str(servers), m, r, make, options, half) for r, m in enumerate(models)),
            lambda: half.kill(0),
        )
        assert servers.primaries[0].process.wait(SECONDS) == 0
    assert all(same(model, whole) for model in models)
