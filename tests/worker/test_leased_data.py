"""Leased data: every sample in exactly one applied push, the same ones in every run, and everyone comes to an end."""

import contextlib
from collections.abc import Iterator
from itertools import chain
from threading import Event
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import TensorDataset

import torch_ps
from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.proxy import Proxy
from tests.support.sample_counts import Counting, Trainer, samples
from tests.support.threads import at_once, spawn
from tests.support.training import mlp, seeded
from torch_ps.worker.commands import status
from torch_ps.worker.leased_data import order_of

Batches = list[list[int]]


@contextlib.contextmanager
def trainers(servers: Servers, count: int, size: int, **options: Any) -> Iterator[list[Trainer]]:
    with contextlib.ExitStack() as stack:
        found = []
        for index in range(count):
            found.append(Trainer(str(servers), f"w{index}", size, **options))
            stack.callback(found[-1].close)
        yield found


def run(
    count: int, size: int, *, mode: str = "sync", shard: dict[str, Any], whole: bool = True, **options: Any
) -> tuple[list[Batches], float]:
    """The batches of each worker, and the samples that the job has absorbed; ``whole``: which are all."""
    with job(mode=mode, workers=count) as servers, trainers(servers, count, size, **options) as workers:
        batches = at_once(*(lambda w=w: list(w.epochs(**shard)) for w in workers))
        status = max(w.optimizer.samples for w in workers)
        fresh = torch_ps.Client(str(servers))
        assert bool(fresh.pull().params["x"].all()) == whole, "a sample was left out"
        fresh.close()
    return batches, status


def ordered(size: int, seed: int, batch_size: int) -> Batches:
    """Samples that one process reads in an epoch."""
    order = order_of(size, shuffle=True, seed=seed).tolist()
    return [order[start : start + batch_size] for start in range(0, size, batch_size)]


def test_sync_workers_read_what_one_process_reads_with_their_batches_together() -> None:
    batches, absorbed = run(3, 52, shard={"batch_size": 4, "epochs": 2, "seed": 5})
    assert absorbed == 104
    together = [sorted(chain(*step)) for step in zip(*batches, strict=True)]
    one: list[list[int]] = []
    for epoch in range(2):
        one += [sorted(part) for part in ordered(52, 5 + epoch, 12)]
    assert together == one


def test_sync_workers_train_as_one_process_does() -> None:
    inputs, labels = torch.randn(50, 12), torch.randint(7, (50,))
    data = TensorDataset(inputs, labels)

    def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(servers: str, name: str, model: torch.nn.Module) -> torch.nn.Module:
        with torch_ps.ParameterServerOptimizer(sgd(model), model, servers, name=name) as optimizer:
            for x, y in torch_ps.shard(data, optimizer, batch_size=4, epochs=2):
                torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return model

    plain = seeded(mlp)
    optimizer = sgd(plain)
    for epoch in range(2):
        for part in ordered(50, epoch, 12):
            torch.autograd.backward(torch.nn.functional.cross_entropy(plain(inputs[part]), labels[part]))
            optimizer.step()
            optimizer.zero_grad()
    fresh = [seeded(mlp) for _ in range(3)]  # before the threads, for the seed is the process's
    with job(workers=3) as servers:
        models = at_once(*(lambda i=i, m=m: train(str(servers), f"w{i}", m) for i, m in enumerate(fresh)))
    for model in models:
        for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)


def test_sync_gives_the_same_samples_to_the_same_worker_in_every_run() -> None:
    shard = {"batch_size": 3, "epochs": 2}
    assert run(2, 41, shard=shard) == run(2, 41, shard=shard)


@pytest.mark.parametrize("mode", ["sync", "async", "ssp"])
@pytest.mark.parametrize(
    ("size", "batch_size", "options"),
    [
        (1, 4, {}),  # fewer samples than workers
        (13, 4, {}),
        (30, 4, {"accumulate": 3}),
        (30, 4, {"local_steps": 3, "outer_lr": 1.0, "outer_momentum": 0.0}),
        (31, 2, {"accumulate": 2, "local_steps": 2, "outer_lr": 1.0, "outer_momentum": 0.0}),
    ],
)
def test_every_sample_counts_once_and_uneven_ends_do_not_hang(
    mode: str, size: int, batch_size: int, options: dict[str, Any]
) -> None:
    settings = {"slack": 2} if mode == "ssp" else {}
    with job(mode=mode, workers=3, **settings) as servers, trainers(servers, 3, size, **options) as workers:
        batches = at_once(*(lambda w=w: list(w.epochs(batch_size=batch_size, epochs=2)) for w in workers))
        with torch_ps.Client(str(servers)) as observer:
            assert observer.pull().params["x"].all()
        absorbed = _absorbed(workers)
    assert sorted(chain(*chain(*batches))) == sorted([*range(size)] * 2)
    assert absorbed == 2 * size


def _absorbed(workers: list[Trainer]) -> float:
    """As of the newest version that one of them has."""
    return max(w.optimizer.samples for w in workers)


def test_items_of_the_dataset_as_they_are_are_shared_out_too() -> None:
    ready_made = [torch.tensor([i]) for i in range(7)]
    with job(workers=2) as servers, trainers(servers, 2, 7) as workers:

        def read(trainer: Trainer) -> list[int]:
            seen = []
            for indices in torch_ps.shard(ready_made, trainer.optimizer):  # type: ignore[call-overload]
                trainer.model(indices).backward()
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                seen += indices.tolist()
            return seen

        parts = at_once(*(lambda w=w: read(w) for w in workers))
    assert sorted(chain(*parts)) == list(range(7))
    assert [len(part) for part in parts] in ([4, 3], [3, 4])


def test_batches_that_a_loader_reads_ahead_are_covered_when_they_are_used() -> None:
    loader = {"num_workers": 1, "multiprocessing_context": "forkserver"}
    batches, absorbed = run(2, 40, shard={"batch_size": 3, "epochs": 2, **loader})
    assert absorbed == 80
    assert sorted(chain(*chain(*batches))) == sorted([*range(40)] * 2)
    assert len(batches[0]) == len(batches[1])


def test_fast_worker_takes_more_where_nobody_waits() -> None:
    with job(mode="async", workers=2) as servers, trainers(servers, 2, 400) as workers:
        far = Event()

        def fast() -> int:
            count = 0
            for indices in workers[0].epochs(batch_size=4):
                count += len(indices)
                if count >= 200:
                    far.set()
            return count

        def slow() -> int:
            count = 0
            for indices in workers[1].epochs(batch_size=4):
                assert far.wait(SECONDS)
                count += len(indices)
            return count

        counts = at_once(fast, slow)
    assert sum(counts) == 400
    assert counts[0] >= 200


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_worker_that_stops_reading_gives_back_what_it_has(mode: str) -> None:
    with job(mode=mode, workers=2) as servers, trainers(servers, 2, 60) as workers:

        def all_of_it() -> int:
            return sum(len(indices) for indices in workers[0].epochs(batch_size=2))

        def a_part() -> int:
            for indices in workers[1].epochs(batch_size=2):
                workers[1].close()
                return len(indices)
            return 0

        counts = at_once(all_of_it, a_part)
        assert sum(counts) == 60
        assert counts[1] <= 2
        with torch_ps.Client(str(servers)) as observer:
            assert observer.pull().params["x"].all()


@pytest.mark.parametrize(("steps", "options"), [(1, {}), (2, {"accumulate": 3}), (2, {"overlap": "forward"})])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_worker_that_breaks_off_an_epoch_goes_on_with_it_and_counts_right(
    mode: str, steps: int, options: dict[str, Any]
) -> None:
    with job(mode=mode, workers=1) as servers, trainers(servers, 1, 60, **options) as (worker,):
        broken_off = worker.epochs(batch_size=2)
        found = [*next(broken_off)] + [i for _ in range(steps - 1) for i in next(broken_off)]
        broken_off.close()  # what it has not trained on is given back
        found += chain(*worker.epochs(batch_size=2))
        assert sorted(found) == sorted([*range(60)] * 2)
        assert worker.optimizer.samples == 2 * 60


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_asks_for_samples_whose_answers_are_lost_leave_none_out(mode: str) -> None:
    with job(mode=mode, workers=1) as servers, Proxy(str(servers)) as proxy:
        worker = Trainer(proxy.address, "w0", 40, plane="network")
        try:
            found = []
            for number, indices in enumerate(worker.epochs(batch_size=2)):
                found += indices
                proxy.sever_after(200 + 37 * number)  # in the middle of an ask, of a push, or of an answer
            assert sorted(found) == list(range(40))
            assert proxy.num_severed > 5
            assert worker.optimizer.samples == 40
        finally:
            worker.close()


def test_second_shard_of_the_same_data_is_its_next_epoch() -> None:
    with job() as servers, trainers(servers, 1, 12) as (worker,):
        first, second = (list(worker.epochs(batch_size=4)) for _ in range(2))
        other = list(worker.epochs(batch_size=4, seed=1))
        assert worker.optimizer.samples == 36
    assert other == second == ordered(12, 1, 4)
    assert first == ordered(12, 0, 4)


def test_look_at_the_first_batch_costs_no_epoch_and_no_sample() -> None:
    with job() as servers, trainers(servers, 1, 12) as (worker,):
        loader = torch_ps.shard(samples(12), worker.optimizer, batch_size=4)
        looked = [next(iter(loader))[0].tolist() for _ in range(3)]
        assert list(worker.epochs(batch_size=4)) == ordered(12, 0, 4)
        assert looked == ordered(12, 0, 4)[:1] * 3
        next(iter(loader))
        assert list(worker.epochs(batch_size=4)) == ordered(12, 1, 4)
        assert worker.optimizer.samples == 24


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_look_of_one_worker_leaves_no_sample_out_and_nobody_waits(mode: str) -> None:
    with job(mode=mode, workers=2) as servers, trainers(servers, 2, 40) as workers:

        def read(worker: Trainer, looks: int) -> Batches:
            for _ in range(looks):
                next(iter(torch_ps.shard(samples(40), worker.optimizer, batch_size=4)))
            return list(worker.epochs(batch_size=4)) + list(worker.epochs(batch_size=4))

        batches = at_once(lambda: read(workers[0], 2), lambda: read(workers[1], 0))
        assert sorted(chain(*chain(*batches))) == sorted([*range(40)] * 2)
        assert _absorbed(workers) == 80


def test_loop_of_single_looks_trains_on_the_next_batch_each_time_and_does_not_end() -> None:
    with job() as servers, trainers(servers, 1, 12) as (worker,):
        loader = torch_ps.shard(samples(12), worker.optimizer, batch_size=4)
        seen = []
        for _ in range(7):
            (indices,) = next(iter(loader))
            step(worker, indices)
            seen.append(indices.tolist())
        assert seen == [*ordered(12, 0, 4), *ordered(12, 1, 4), ordered(12, 2, 4)[0]]
        assert worker.optimizer.samples == 28
        assert worker.optimizer.weight == 1


def step(trainer: Trainer, indices: torch.Tensor) -> None:
    trainer.model(indices).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def read_all(loader: Any, trainer: Trainer) -> None:
    for (indices,) in loader:
        step(trainer, indices)


def break_after_a_step(loader: Any, trainer: Trainer) -> None:
    for (indices,) in loader:
        step(trainer, indices)
        break


def break_before_the_step(loader: Any, trainer: Trainer) -> None:
    for (indices,) in loader:
        trainer.model(indices).backward()
        break
    assert trainer.optimizer.weight == len(indices)  # of the gradient that the next step takes
    trainer.optimizer.step()


def raise_in_the_loop(loader: Any, trainer: Trainer) -> None:
    with contextlib.suppress(KeyError):
        for (indices,) in loader:
            step(trainer, indices)
            raise KeyError


def read_two_at_once(loader: Any, trainer: Trainer) -> None:
    for (indices,), _ in zip(loader, torch_ps.shard(samples(5), trainer.optimizer, batch_size=2), strict=False):
        step(trainer, indices)


@pytest.mark.parametrize(
    "loop", [read_all, break_after_a_step, break_before_the_step, raise_in_the_loop, read_two_at_once]
)
@pytest.mark.parametrize("before", [1.0, 6.0])
def test_weight_after_the_loop_is_what_it_was_before(loop: Any, before: float) -> None:
    with job() as servers, trainers(servers, 1, 7) as (worker,):
        worker.optimizer.weight = before
        loop(torch_ps.shard(samples(7), worker.optimizer, batch_size=4), worker)
        assert worker.optimizer.weight == before


def test_batches_that_are_not_full_are_left_out_with_drop_last_and_nobody_hangs() -> None:
    batches, counted = run(2, 21, shard={"batch_size": 4, "epochs": 2, "drop_last": True}, whole=False)
    assert [[len(batch) for batch in each] for each in batches] == [[4] * 4] * 2
    assert counted == 32


def test_loader_has_the_attributes_of_a_dataloader_and_says_why_it_has_no_sampler() -> None:
    with job() as servers, trainers(servers, 1, 7) as (worker,):
        data, generator = samples(7), torch.Generator()
        leased = torch_ps.shard(data, worker.optimizer, batch_size=4, drop_last=True, generator=generator)
        static = torch_ps.shard(data, worker.optimizer, batch_size=4, split="static", generator=generator)
        for loader in (leased, static):
            assert loader.dataset is data
            assert (loader.batch_size, loader.drop_last, loader.num_workers) == (4, True, 0)
            assert loader.generator is generator
            assert not loader.pin_memory
            assert callable(loader.collate_fn)
        with pytest.raises(AttributeError, match="the servers give out the samples"):
            _ = leased.batch_sampler
        assert not hasattr(leased, "nonsense")
        assert not hasattr(static, "nonsense")


def test_static_shard_has_a_new_order_where_the_script_sets_the_epoch() -> None:
    with job() as servers, trainers(servers, 1, 12) as (worker,):
        loader = torch_ps.shard(samples(12), worker.optimizer, batch_size=4, split="static")
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            assert [indices.tolist() for (indices,) in loader] == ordered(12, epoch, 4)


def test_batch_that_the_loop_skips_is_covered_without_a_gradient_and_nobody_hangs() -> None:
    with job(workers=2) as servers, trainers(servers, 2, 8) as workers:

        def read(trainer: Trainer, skip: int) -> int:
            shard = torch_ps.shard(TensorDataset(torch.arange(8)), trainer.optimizer, batch_size=2)
            steps = 0
            for number, (indices,) in enumerate(shard):
                if number >= skip:
                    continue
                trainer.model(indices).backward()
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                steps += 1
            return steps

        assert at_once(lambda: read(workers[0], 9), lambda: read(workers[1], 1)) == [2, 1]


def test_wait_for_samples_says_who_has_them_and_ps_status_the_same() -> None:
    with job(mode="async", workers=2) as servers, trainers(servers, 2, 4, timeout=2.0) as workers:
        holder = workers[1].epochs(batch_size=4)
        shard = iter(torch_ps.shard(TensorDataset(torch.arange(4)), workers[1].optimizer, batch_size=4))
        next(shard)
        waiting = spawn(lambda: list(workers[0].epochs(batch_size=4)))
        until(lambda: any(w.waiting_seconds > 0 for w in servers.status().worker), "w0 waits")
        shown = CliRunner().invoke(status.main, ["--servers", str(servers)], env={"COLUMNS": "400"}).output
        with pytest.raises(torch_ps.WaitTimeout, match=r"'w0' has waited for samples for 1\.5 s: ") as caught:
            waiting.result(SECONDS)
        words = "the last 4 samples of epoch 0 of the data set of 4 samples with seed 0 are with w1"
        assert words in str(caught.value)
        assert f"{words}, for " in shown
        del holder


def test_wait_for_a_worker_that_does_not_read_says_so() -> None:
    says = "is dealt to all at once, and w1 has not asked for it"
    with (
        job(workers=2) as servers,
        trainers(servers, 2, 4, timeout=5.0) as workers,
        pytest.raises(torch_ps.WaitTimeout, match=says),
    ):
        list(workers[0].epochs(batch_size=2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "even"}, "split must be one of leased, static; got 'even'"),
        ({"epochs": 0}, "epochs must be >= 1; got 0"),
        ({"batch_size": -1}, "batch_size must be >= 1; got -1"),
        ({"split": "static", "name": "a"}, "name='a' is for split leased"),
        ({"sampler": [0]}, "sampler= is not for torch_ps.shard, which gives each worker its samples"),
        ({"split": "static", "batch_sampler": [[0]]}, "batch_sampler= is not for torch_ps.shard"),
        ({"drop_last": True}, "drop_last=True needs a batch_size"),
    ],
)
def test_shard_refuses_what_means_nothing(options: dict[str, Any], says: str) -> None:
    model = Counting(4)
    with (
        job() as servers,
        torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers)) as optimizer,
    ):
        with pytest.raises(torch_ps.ConfigError, match=says):
            torch_ps.shard(TensorDataset(torch.arange(4)), optimizer, **options)
        with pytest.raises(torch_ps.ConfigError, match="samples of the dataset must be >= 1; got 0"):
            torch_ps.shard(TensorDataset(torch.arange(0)), optimizer)
