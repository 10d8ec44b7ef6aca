"""A model whose gradients torch.distributed averages is refused before a server hears of it."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import torch_ps
from tests.support.jobs import job
from torch_ps.worker.runtime.other_averaging import refuse_other_averaging


@pytest.fixture
def _alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone_in_a_group")
def test_a_model_in_distributed_data_parallel_is_refused() -> None:
    inner = DistributedDataParallel(nn.Linear(2, 1))
    for model in (inner, nn.Sequential(inner)):
        with pytest.raises(torch_ps.ConfigError, match=r"wrapped in DistributedDataParallel.* the module itself"):
            refuse_other_averaging(model)


@pytest.mark.usefixtures("_alone_in_a_group")
def test_a_model_that_is_wrapped_after_its_optimizer_was_made_is_refused() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    with job() as servers:
        optimizer = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers))
        with optimizer:
            for wrapped in (model, nn.Sequential(model)):
                with pytest.raises(torch_ps.ConfigError, match=r"leave DistributedDataParallel out"):
                    DistributedDataParallel(wrapped)
            DistributedDataParallel(other)
        DistributedDataParallel(model)


def test_accelerate_that_has_started_a_group_is_told_apart_from_one_that_is_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = types.ModuleType("accelerate.state")
    state.PartialState = types.SimpleNamespace(_shared_state={"backend": "gloo", "num_processes": 2})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    with pytest.raises(torch_ps.ConfigError, match=r"call torch_ps\.alone\(\) first"):
        refuse_other_averaging(nn.Linear(2, 1))
    state.PartialState._shared_state.update(backend=None, num_processes=1)
    refuse_other_averaging(nn.Linear(2, 1))
