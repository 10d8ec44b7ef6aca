"""Which device a worker takes, on hosts with and without GPUs."""

from typing import NamedTuple

import pytest
import torch

from torch_ps.common.device import choose
from torch_ps.common.errors import ConfigError
from torch_ps.worker import device


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
