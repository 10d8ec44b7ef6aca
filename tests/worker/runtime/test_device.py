"""Which device a worker takes, on hosts with and without GPUs."""

import os
from typing import NamedTuple

import pytest
import torch

import torch_ps
from torch_ps.common.devices import choose
from torch_ps.common.errors import ConfigError
from torch_ps.worker.runtime import device
from torch_ps.worker.runtime.torchrun_env import process_group


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Torch claims to have that many."""
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


@pytest.mark.parametrize(
    ("gpus", "wanted", "local_rank", "found"),
    [
        (0, "auto", 1, "cpu"),
        (0, "cpu", 0, "cpu"),
        (2, "cpu", 0, "cpu"),
        (2, "auto", 1, "cuda:1"),
        (2, "auto", 2, "cuda:0"),  # more workers than GPUs share them
        (2, "cuda", 1, "cuda:1"),
        (2, "cuda:0", 1, "cuda:0"),
    ],
    indirect=["gpus"],
)
def test_a_worker_takes_the_gpu_of_its_local_rank_or_the_cpu(
    gpus: int, wanted: str, local_rank: int, found: str
) -> None:
    assert str(choose(wanted, local_rank)) == found


@pytest.mark.parametrize(
    ("gpus", "variables", "found"),
    [
        (0, {"LOCAL_RANK": "1"}, "cpu"),
        (4, {}, "cuda:0"),  # a worker that no launcher started
        (4, {"LOCAL_RANK": "3"}, "cuda:3"),  # torchrun, ps-run
        (1, {"LOCAL_RANK": "3"}, "cuda:0"),  # Slurm shows each task its own
        (4, {"LOCAL_RANK": "3", "PS_DEVICE": "cuda:1"}, "cuda:1"),
        (4, {"LOCAL_RANK": "3", "PS_DEVICE": "cpu"}, "cpu"),
    ],
    indirect=["gpus"],
)
def test_a_script_gets_the_device_that_a_ready_made_task_would_have(
    gpus: int, variables: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(torch_ps.device()) == found
    assert [str(each) for each in current] == [found] * (found != "cpu")  # and "cuda" means it


@pytest.mark.parametrize(
    ("visible", "gpus", "left"),
    [(None, 4, "2"), ("4,5,6,7", 4, "6"), ("GPU-a,GPU-b", 2, "GPU-a"), ("3", 1, "3"), (None, 1, None), (None, 0, None)],
    indirect=["gpus"],
)
def test_alone_leaves_the_gpu_of_the_local_rank_visible_and_what_a_launcher_said_to_us(
    visible: str | None, gpus: int, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = process_group(2, 8, "host0:1", one_host=True) | {"RANK": "6"}
    monkeypatch.setattr(os, "environ", told)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    torch_ps.alone()
    torch_ps.alone()
    ours = {"PS_RANK": "6", "PS_WORLD": "8"}
    assert os.environ == ours | ({} if left is None else {"CUDA_VISIBLE_DEVICES": left})


@pytest.mark.parametrize(
    ("gpus", "wanted", "sentence"),
    [
        (0, "cuda", "finds no GPU here; use --device cpu"),
        (0, "cuda:0", "finds no GPU here"),
        (1, "cuda:1", "device cuda:1: this host has 1 GPU, cuda:0"),
        (4, "cuda:7", "device cuda:7: this host has 4 GPUs, cuda:0 to cuda:3"),
    ],
    indirect=["gpus"],
)
def test_a_gpu_that_is_not_there_is_refused(gpus: int, wanted: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        choose(wanted)


def test_a_batch_keeps_its_shape_when_it_moves() -> None:
    x, y = torch.ones(3, 2), torch.zeros(3)
    batch = {"pair": Pair(x, y), "list": [x, (y, "text")], "number": 1}
    moved = device.move(batch, torch.device("meta"))
    assert moved["pair"].image.is_meta
    assert moved["list"][1][0].is_meta
    assert (moved["list"][1][1], moved["number"]) == ("text", 1)
    assert type(moved["pair"]) is Pair


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.ones(5, 2), 5),
        ((torch.ones(4, 2), torch.ones(4)), 4),
        ({"ids": torch.ones(3, 7), "mask": torch.ones(3, 7)}, 3),
        ([["text"], torch.ones(6)], 6),
        (torch.tensor(1.0), 1),
        ("text", 1),
    ],
)
def test_samples_are_counted_by_the_first_dimension(batch: object, samples: int) -> None:
    assert device.samples_of(batch) == samples
