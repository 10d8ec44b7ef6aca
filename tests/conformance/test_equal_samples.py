"""Two workers that train on the same samples: the servers tell it, and stay silent where the samples differ."""

import pytest
import torch
from click.testing import CliRunner

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from tests.support.training import backward, mlp, seeded
from torch_ps.worker.commands import status

WORDS = "workers w0 and w1 have sent equal gradients in 3 steps in a row"


def train(servers: Servers, rank: int, model: torch.nn.Module, *, divided: bool, plane: str, steps: int = 6) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch_ps.ParameterServerOptimizer(sgd, model, str(servers), rank=rank, plane=plane) as optimizer:
        for step in range(steps):
            backward(model, step, worker=rank if divided else 0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("plane", ["memory", "network"])
@pytest.mark.parametrize(("divided", "said"), [(False, 1), (True, 0)], ids=["same samples", "divided"])
def test_equal_samples_are_told_in_the_log_and_by_ps_status(plane: str, divided: bool, said: int) -> None:
    models = [seeded(mlp) for _ in range(2)]
    with job(workers=2, shards=2) as servers:
        at_once(*(lambda r=r, m=m: train(servers, r, m, divided=divided, plane=plane) for r, m in enumerate(models)))
        shown = " ".join(CliRunner().invoke(status.main, ["--servers", str(servers)]).output.split())
        assert servers.log.count(WORDS) == shown.count(WORDS) == len(servers.status().advice) == said
        assert not servers.status(1).advice
