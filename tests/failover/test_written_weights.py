"""A standby writes the weights that a loop has written, and makes the step after them, as its primary does."""

import pytest
import torch

import torch_ps
from tests.support.jobs import Addresses, until
from tests.support.raw_worker import raw_workers
from tests.support.replicated import replicated

PARAMS = {"x": torch.linspace(-1.0, 1.0, 300), "y": torch.linspace(2.0, 3.0, 40)}
SPEC = torch_ps.OptimizerSpec("SGD", lr=0.25)


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_written_values_survive_a_take_over(codec: str) -> None:
    """Those of the last step are exact, also for a worker that pulls differences."""
    gradient = torch.randn(340, generator=torch.Generator().manual_seed(1))
    with (
        replicated(workers=1, mode="async") as servers,
        torch_ps.Client(str(servers), name="w1", compress_pull=codec) as voter,
    ):
        voter.init(PARAMS, SPEC)
        servers.wait()
        voter.pull()
        with raw_workers(Addresses([str(servers)]), PARAMS, hyper={"lr": 0.25}) as (worker,):
            worker.pull(0)
            worker.ahead(0, 1, gradient)
            worker.push(0, ahead=1)
            worker.answer()
            voter.pull()
            worker.push(0, torch.full((40,), 5.0), missing=True, written=[1])
            worker.answer()
            worker.ahead(0, 2, gradient)
            worker.push(0, torch.ones(300), ahead=2, written=[0])
            last = worker.answer()
        until(lambda: len(servers.status(servers.primaries[0]).worker) == 1, "the standby knows who is left")
        servers.kill(0)
        until(lambda: servers.role(servers.standbys[0]) == "alone", "the standby serves")
        with torch_ps.Client(servers.standbys[0].address) as observer:
            found = [client.pull() for client in (observer, voter)]
    expected = {"x": 1.0 - 0.25 * gradient[:300], "y": 5.0 - 0.25 * gradient[300:]}
    for result in found:
        assert result.version == last.header.version == 3
        for name, values in expected.items():
            assert torch.equal(result.params[name], values)
