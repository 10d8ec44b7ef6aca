"""A slip of one worker, or what looks like one, is refused; the server and the other workers go on.

Each of these ended a server once: True for a number, a push that was parked and taken, weights whose sum is infinite.
"""

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.raw_worker import raw_workers
from torch_ps.common.pb import parameter_server_pb2 as pb

X = {"x": torch.zeros(4)}
ONES = torch.ones(4)


def test_slips_of_one_worker_are_refused_and_the_other_goes_on() -> None:
    with job(mode="async") as servers, raw_workers(servers, X, ("w0", "w1"), hyper={"lr": 0.5}) as (honest, other):
        epoch = 1_000_000

        def goes_on() -> None:
            honest.push(0, ONES)
            assert honest.answer().header.applied

        goes_on()
        for slip, message in (
            ({"hyper": {"weight_decay": pb.HyperValue(flag=True)}}, "weight_decay is True; it has to be a number"),
            ({"hyper": {"momentum": pb.HyperValue(flag=True)}}, "momentum is True; it has to be a number"),
            ({"weight": 1e308}, r"worker 'w1': Push.weight is 1e\+308; it has to be 0 or a number from"),
            ({"weight": 1e-300}, "worker 'w1': Push.weight is 1e-300"),
        ):
            other.push(0, ONES, **slip)
            with pytest.raises(torch_ps.ProtocolError, match=message):
                other.answer()
            other.open()
            goes_on()
        other.push(0, ONES, epoch=epoch)  # parked
        other.push(0, ONES)  # the same step again, of the roster that is known: it stays parked
        goes_on()
    log = servers.log
    assert "bug" not in log
    assert "Traceback" not in log


def test_flag_for_a_number_in_param_groups_costs_its_own_worker_alone() -> None:
    """An honest mistake: plain torch fails in that process."""

    def step(optimizer: torch_ps.ParameterServerOptimizer, model: torch.nn.Module) -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with job(mode="async") as servers:
        models = [torch.nn.Linear(2, 1) for _ in range(2)]
        workers = [
            torch_ps.ParameterServerOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), m, str(servers), name=f"w{n}")
            for n, m in enumerate(models)
        ]
        for worker, model in zip(workers, models, strict=True):
            step(worker, model)
        workers[1].param_groups[0]["weight_decay"] = True
        with pytest.raises(torch_ps.PsError, match="weight_decay is True; it has to be a number"):
            step(workers[1], models[1])
        step(workers[0], models[0])
        workers[0].close()
