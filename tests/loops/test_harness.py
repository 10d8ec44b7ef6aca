"""The comparison of loops finds what it is for: a difference in any value, at the line where it begins."""

import random
import re
from itertools import pairwise

import pytest
import torch

from tests.loops import lines
from tests.loops.observed import Moment, end, everything, first_difference, nothing, observe
from tests.loops.plain import make, plain_torch
from tests.loops.random_loops import _compiled, draw
from tests.loops.registry import KINDS, Kind, load
from tests.loops.run import Run


def usual(r: Run) -> None:
    for number in range(3):
        loss = r.loss(number)
        loss.backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


def writes_a_weight(r: Run) -> None:
    for number in range(3):
        r.model[2].bias.data[0] *= 1 + 2**-20 * r.rank * number
        r.optimizer.step()


def moments(loop: object, rank: int = 0) -> list[Moment]:
    kind = Kind("planted", "test", loop)  # type: ignore[arg-type]
    run = Run(*make(kind), rank, 1, is_plain=True)
    seen, error = observe(kind.loop, run, everything)
    assert error is None
    return [*seen, end(run)]


def test_each_line_is_seen_once_it_is_done() -> None:
    texts = [each.line.partition(": ")[2] for each in moments(usual)[:-1]]
    assert texts[:6] == [
        "for number in range(3):",
        "loss = r.loss(number)",
        "loss.backward()",
        "r.optimizer.step()",
        "r.optimizer.zero_grad()",
        "for number in range(3):",
    ]
    assert moments(usual)[-1].line == "end"


def test_runs_of_one_loop_are_the_same_and_of_other_data_are_not() -> None:
    assert first_difference(moments(usual), moments(usual)) == ""
    assert "variable loss" in first_difference(moments(usual), moments(usual, rank=1))


def test_last_bit_of_one_weight_is_seen_in_the_line_that_changes_it() -> None:
    found = first_difference(moments(writes_a_weight), moments(writes_a_weight, rank=1))
    assert re.fullmatch(r"after '\d+: r\.model\[2\]\.bias\.data.*': 2\.bias", found)


def test_gradient_that_is_none_is_not_one_of_zero() -> None:
    def zeros(r: Run) -> None:
        r.model.zero_grad()
        r.model[0].bias.grad = torch.zeros(33)

    def none(r: Run) -> None:
        r.model.zero_grad()
        r.model[0].bias.grad = None

    assert first_difference(moments(zeros)[-1:], moments(none)[-1:]) == "after 'end': 0.bias.grad"


def test_two_workers_on_one_batch_are_as_one() -> None:
    def same_data(r: Run) -> None:
        r.rank = 0
        usual(r)

    alone, first, second = (
        *plain_torch(Kind("one", "test", same_data), 1, nothing),
        *plain_torch(Kind("two", "test", same_data), 2, nothing),
    )
    assert first_difference(alone, first) == ""
    assert first_difference(alone, second) == ""


def test_mean_of_two_workers_is_that_of_both_batches() -> None:
    def both(r: Run) -> None:
        r.generator = lambda number: torch.Generator().manual_seed(1000 * r.rank + number)  # type: ignore[method-assign]
        for number in range(3):
            for rank in range(2):
                r.rank = rank
                (r.loss(number) / 2).backward()
            r.optimizer.step()
            r.optimizer.zero_grad()

    (alone,) = plain_torch(Kind("one", "test", both), 1, nothing)
    first, second = plain_torch(Kind("two", "test", usual), 2, nothing)
    assert first_difference(first, second) == ""
    for name, value in alone[-1].values.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(first[-1].values[name], value)


def test_there_are_more_than_two_hundred_kinds() -> None:
    assert len(load()) > 200
    assert load() is KINDS


def test_seed_gives_the_same_random_loop_again() -> None:
    assert draw(7, 3) == draw(7, 3)
    assert draw(7, 3) != draw(7, 4)
    assert {draw(7, number).optimizer for number in range(22)} == {draw(8, number).optimizer for number in range(22)}


@pytest.mark.parametrize("number", range(20))
def test_plain_torch_runs_what_is_drawn(number: int) -> None:
    setting = draw(11, number)
    plain_torch(setting.kind, 1, nothing)


def test_loop_that_keeps_its_promise_does_nothing_between_backward_and_step() -> None:
    drawn = lines.draw(random.Random(3), 60, keeps_promise=True)
    after = [later for line, later in pairwise(drawn) if line.startswith("backward")]
    assert after
    assert all(line.startswith("step(r)") for line in after)


def test_source_of_a_random_loop_is_found_by_its_lines() -> None:
    loop = _compiled("def loop(r):\n    begin(r)\n    forward(r, 0, 3)\n    backward(r, 0)\n")
    assert [each.line for each in moments(loop)] == ["2: begin(r)", "3: forward(r, 0, 3)", "4: backward(r, 0)", "end"]
