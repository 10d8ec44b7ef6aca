"""--delay-compensation: a standby knows what workers had pulled, and corrects their gradients as its primary does."""

import pytest
import torch

import torch_ps
from tests.support.jobs import until
from tests.support.replicated import replicated

SPEC = torch_ps.OptimizerSpec("SGD", lr=0.25)
SIZE = 300


def gradient(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(SIZE, generator=torch.Generator().manual_seed(step))}


def last_values(form: str, codec: str, *, kill: bool) -> torch.Tensor:
    """Two workers push in turn, so that each gradient is a version old; w1's comes after the primary has gone."""
    with (
        replicated(workers=1, mode="async", delay_compensation=form) as servers,
        torch_ps.Client(str(servers), name="w0", compress_pull=codec) as first,
        torch_ps.Client(str(servers), name="w1", compress_pull=codec) as second,
    ):
        for client in (first, second):
            client.init({"x": torch.ones(SIZE)}, SPEC)
        servers.wait()
        bases = [client.pull().version for client in (first, second)]
        for step in range(4):
            client = (first, second)[step % 2]
            if kill and step == 3:
                servers.kill(0)
                until(lambda: servers.role(servers.standbys[0]) == "alone", "the standby serves")
            result = client.push(gradient(step), base=bases[step % 2])
            assert result.staleness == (1 if step else 0)
            bases[step % 2] = result.version
        with torch_ps.Client(servers.standbys[0].address if kill else str(servers)) as observer:
            return observer.pull().params["x"]


@pytest.mark.parametrize(("form", "codec"), [("constant:0.5", "none"), ("adaptive:0.5", "fp16")])
def test_first_gradient_after_a_take_over_is_compensated_as_if_nothing_had_happened(form: str, codec: str) -> None:
    assert torch.equal(last_values(form, codec, kill=True), last_values(form, codec, kill=False))


def test_gradient_is_compensated_at_all() -> None:
    plain, corrected = (last_values(form, "none", kill=False) for form in ("off", "constant:0.5"))
    assert not torch.allclose(plain, corrected, rtol=1e-2)
