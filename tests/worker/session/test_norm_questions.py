"""The norm of a mean gradient, put together from the answers of all shards."""

import math

import pytest
import torch

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.session.norm_questions import NormQuestions, combine


def measured(*norms: float, step: int = 4, turn: int = 0, names: tuple[str, ...] = ("w0", "w1")) -> pb.Measured:
    return pb.Measured(step=step, round=turn, norm=norms, contributor=names)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5, 200.0, math.inf])
def test_norm_of_the_parts_is_that_of_the_whole(power: float) -> None:
    whole = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [float(torch.linalg.vector_norm(part, power)) for part in torch.split(whole, [1, 499, 500])]
    expected = float(torch.linalg.vector_norm(whole / whole.abs().max(), power) * whole.abs().max())
    assert combine(parts, power) == pytest.approx(expected, rel=1e-12)
    assert combine(reversed(parts), power) == combine(parts, power)


@pytest.mark.parametrize(("norms", "expected"), [([], 0.0), ([0.0, 0.0], 0.0), ([3.0, math.inf], math.inf)])
def test_norms_of_nothing_and_of_infinite_values(norms: list[float], expected: float) -> None:
    assert combine(norms, 2.0) == expected


def test_norm_of_a_part_that_is_not_a_number_makes_the_whole_one_so() -> None:
    assert math.isnan(combine([math.inf, math.nan], 2.0))


def test_answer_of_another_round_is_not_taken() -> None:
    questions = NormQuestions()
    assert questions.begin(4) == 0
    assert not questions.take(0, measured(9.0, turn=1))
    assert not questions.take(0, measured(9.0, step=3))
    assert questions.take(0, measured(3.0))
    assert questions.take(1, measured(4.0))
    assert questions.finish(2.0).norm == 5.0


def test_rounds_count_the_answered_questions_of_a_step() -> None:
    questions = NormQuestions()
    assert [questions.begin(4), questions.begin(4)] == [0, 0]
    questions.take(0, measured(1.0))
    questions.finish(2.0)
    assert [questions.begin(4), questions.begin(5)] == [1, 0]


def test_worker_is_alone_where_a_shard_has_its_gradient_only() -> None:
    questions = NormQuestions()
    questions.begin(4)
    questions.take(0, measured(3.0))
    questions.take(1, measured(names=("w0",)))
    found = questions.finish(2.0)
    assert (found.norm, found.contributors) == (None, ("w0",))
