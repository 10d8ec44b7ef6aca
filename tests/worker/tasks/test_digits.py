"""Handwritten digits, with plain torch: the split, the shapes, and what one process reaches."""

from itertools import islice

import pytest
import torch

from torch_ps.common.errors import ConfigError
from torch_ps.worker.tasks.digits import DigitsTask, read


def images(part: int) -> list[tuple[float, ...]]:
    return [tuple(image) for image in read()[part].tensors[0].tolist()]


def train(task: DigitsTask, *, lr: float, steps: int, batch_size: int) -> float:
    """Validation accuracy in percent after plain SGD in this process."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model, lr)
    for batch in islice(task.batches(0, 1, batch_size, 0), steps):
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model, batch))
        optimizer.step()
    with torch.inference_mode():
        return 100 * task.evaluate(model.eval())["accuracy"]


def test_all_1797_images_are_in_one_of_the_two_parts() -> None:
    training, validation = images(0), images(1)
    assert (len(training), len(validation)) == (1500, 297)
    assert len({*training, *validation}) == 1797


def test_pixels_are_between_0_and_1_and_labels_are_digits() -> None:
    for pixels, labels in (part.tensors for part in read()):
        assert pixels.dtype == torch.float32
        assert (pixels.min().item(), pixels.max().item()) == (0, 1)
        assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize(("kind", "fewest", "most"), [("mlp", 4810, 4810), ("cnn", 10_000, 40_000)])
def test_models_take_a_batch_and_have_the_size_they_claim(kind: str, fewest: int, most: int) -> None:
    task = DigitsTask(kind)
    model = task.model()
    pixels, _ = next(task.batches(0, 1, 5, 0))
    assert model(pixels).shape == (5, 10)
    assert fewest <= sum(p.numel() for p in model.parameters()) <= most


def test_the_cnn_has_batch_statistics_to_share() -> None:
    buffers = {name.rsplit(".", 1)[1] for name, _ in DigitsTask("cnn").model().named_buffers()}
    assert buffers == {"running_mean", "running_var", "num_batches_tracked"}


def test_one_process_reaches_the_reference_accuracy() -> None:
    assert train(DigitsTask(), lr=0.1, steps=3000, batch_size=32) == pytest.approx(97.6, abs=1.5)


def test_eight_times_the_batch_and_the_rate_reaches_the_same() -> None:
    assert train(DigitsTask(), lr=0.8, steps=375, batch_size=256) == pytest.approx(97.5, abs=1.5)


def test_the_cnn_learns() -> None:
    assert train(DigitsTask("cnn"), lr=0.1, steps=150, batch_size=32) > 95


def test_data_of_ones_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads no data; got data='x'"):
        DigitsTask(data="x")
