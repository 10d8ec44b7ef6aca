"""``--precision``: a ready-made task learns in every one of them, and what travels stays fp32."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.support.gpu import DEVICES
from tests.support.jobs import job
from tests.support.training import seeded
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker.training.loop import prepare, train
from torch_ps.worker.training.precision import Precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_task_learns_in_every_precision(precision: str, accumulate: int, tmp_path: Path) -> None:
    samples = 24000
    with job() as servers:
        config = WorkerConfig(
            servers=str(servers),
            task="digits",
            device="cpu",
            precision=precision,
            samples=samples,
            batch_size=60,
            lr=0.3,
            accumulate=accumulate,
            evaluations=1,
            events=str(tmp_path / "events"),
        )
        train(prepare(config))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    (accuracy,) = [e["metrics"]["accuracy"] for e in events if e["event"] == "evaluation"]
    assert accuracy > 0.9
    (start,) = [e for e in events if e["event"] == "start"]
    assert start["settings"]["precision"] == precision
    (end,) = [e for e in events if e["event"] == "end"]
    assert end["samples"] >= samples


@pytest.mark.parametrize(("name", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("device", DEVICES)
def test_matrices_are_multiplied_in_the_precision_and_gradients_come_in_fp32(
    name: str, dtype: torch.dtype | None, device: str
) -> None:
    model = seeded(lambda: torch.nn.Linear(8, 8)).to(device)
    precision = Precision(name, torch.device(device))
    with precision.autocast():
        out = model(torch.ones(2, 8, device=device))
    assert out.dtype == (dtype or torch.float32)
    precision.backward(out.float().sum())
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_training_that_has_diverged_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(
        "torch_ps.worker.tasks.digits.DigitsTask.loss", lambda self, model, batch: model(batch[0]).sum() * math.nan
    )
    with job() as servers:
        train(prepare(WorkerConfig(servers=str(servers), task="digits", overlap="off", evaluations=0)))
    assert "no finite gradient in 100 steps: training has diverged" in caplog.text
