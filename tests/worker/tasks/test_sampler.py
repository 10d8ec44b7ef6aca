"""Which samples a worker takes."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from torch_ps.common.errors import ConfigError
from torch_ps.worker.tasks import sampler as stream

Draw = Callable[[int, int, int, int, int], Iterator[torch.Tensor]]
both = pytest.mark.parametrize("draw", [stream.shuffled, stream.drawn])


@both
@pytest.mark.parametrize("world", [2, 3])
def test_batch_k_of_n_workers_is_batch_k_of_one_with_n_times_the_size(draw: Draw, world: int) -> None:
    workers = [draw(100, rank, world, 4, 7) for rank in range(world)]
    for whole in itertools.islice(draw(100, 0, 1, 4 * world, 7), 30):
        assert torch.equal(torch.cat([next(worker) for worker in workers]), whole)


@both
def test_workers_with_unequal_batches_see_every_sample_equally_often_in_the_long_run(draw: Draw) -> None:
    streams = [draw(100, 0, 2, 16, 7), draw(100, 1, 2, 4, 7)]
    counts = [torch.bincount(torch.cat(list(itertools.islice(each, 4000))), minlength=100) for each in streams]
    for count in counts:
        mean = count.float().mean()
        assert (count - mean).abs().max() < 5 * mean.sqrt(), "no sample is left out by either worker"


def test_an_epoch_holds_each_index_once_even_where_batches_do_not_fit() -> None:
    batches = itertools.islice(stream.shuffled(10, 0, 1, 4, 0), 5)
    first, second = torch.cat(list(batches)).view(2, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


@both
def test_the_seed_decides_the_order(draw: Draw) -> None:
    one, same, other = (next(draw(1000, 0, 1, 32, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert torch.bincount(next(stream.shuffled(3, 0, 1, 9, 0))).tolist() == [3, 3, 3]


@pytest.mark.parametrize(("rank", "world", "batch_size"), [(2, 2, 1), (-1, 1, 1), (0, 1, 0)])
def test_a_place_outside_the_job_is_refused(rank: int, world: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=r"must be"):
        next(stream.shuffled(10, rank, world, batch_size, 0))
