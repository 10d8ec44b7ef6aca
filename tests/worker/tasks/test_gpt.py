"""The byte-level GPT."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from torch_ps.worker.tasks.gpt import Gpt, GptTask, Size, generate, rotate, rotation

SMALL = Size(width=32, layers=2, heads=2, context=16)


@pytest.fixture
def task(tmp_path: Path) -> GptTask:
    (tmp_path / "text.py").write_text("def f(x):\n    return x + 1\n" * 400)
    return GptTask(str(tmp_path / "text.py"), SMALL)


def random_gpt() -> Gpt:
    """With every matrix random: a fresh model's layers add nothing yet, so nothing would leak through them."""
    model = Gpt(SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_logits_have_one_row_of_256_per_byte() -> None:
    assert Gpt(SMALL)(torch.zeros(3, 10, dtype=torch.int64)).shape == (3, 10, 256)


def test_a_future_byte_changes_no_past_logit() -> None:
    model = random_gpt()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_a_past_byte_changes_every_later_logit() -> None:
    model = random_gpt()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 256
    different = (model(tokens) != model(changed)).any(-1)
    assert different.all()


def test_only_the_distance_of_two_positions_counts() -> None:
    turn = rotation(16, 8)
    query, key = torch.randn(8), torch.randn(8)
    products = rotate(query.expand(16, 8), *turn) @ rotate(key.expand(16, 8), *turn).T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_output_and_input_share_one_embedding() -> None:
    model = Gpt(SMALL)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if "byte" in name] == ["byte.weight"]
    assert not any("output" in name or "head." in name for name in names)
    # A byte that is never read gets its gradient through the output alone.
    torch.autograd.backward(model(torch.zeros(1, 4, dtype=torch.int64))[..., 200].sum())
    assert model.byte.weight.grad is not None
    assert model.byte.weight.grad[200].abs().sum() > 0


def test_the_shipped_size_has_one_to_three_million_parameters() -> None:
    assert 1e6 < sum(p.numel() for p in Gpt(Size()).parameters()) < 3e6


def test_an_untrained_model_knows_nothing(task: GptTask) -> None:
    torch.manual_seed(0)
    loss = task.loss(task.model(), next(task.batches(0, 1, 8, 0))).item()
    assert loss == pytest.approx(torch.log(torch.tensor(256.0)).item(), abs=0.3)


def test_training_learns_the_text(task: GptTask) -> None:
    model = task.model()
    optimizer = task.optimizer(model, 1e-2)
    before = task.evaluate(model)["loss"]
    for batch in islice(task.batches(0, 1, 8, 0), 30):
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model, batch))
        optimizer.step()
    assert task.evaluate(model)["loss"] < before / 2


def test_batches_are_windows_of_the_training_text(task: GptTask) -> None:
    batch = next(task.batches(1, 2, 4, 0))
    assert batch.shape == (4, 17)
    text = bytes(task._text.training.tolist())
    assert all(bytes(row.tolist()) in text for row in batch)


def test_evaluation_repeats_exactly(task: GptTask) -> None:
    model = task.model()
    assert task.evaluate(model) == task.evaluate(model)


def test_generated_text_goes_on_from_the_prompt_and_repeats_with_its_seed() -> None:
    model = Gpt(SMALL)
    with torch.inference_mode():
        first, again, other = (generate(model, "def ", 40, 16, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("def ")
    assert len(first.encode(errors="replace")) >= 44


def test_the_schedule_warms_up_and_falls() -> None:
    factors = [GptTask.schedule(None, n / 100) for n in range(101)]  # type: ignore[arg-type]
    peak = factors.index(max(factors))
    assert 0 < factors[0] < 0.1
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
