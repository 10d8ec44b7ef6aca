"""What trainers do beside the step, with servers and without: accumulated gradients and averaged weights.

One worker. Where the trainer accumulates, it calls ``step`` once for all passes, and the bits are the same. With
``accumulate`` it calls ``step`` after each, and zeroes gradients in between as it does: ``model.zero_grad()``.
Lightning's StochasticWeightAveraging writes weights, and trains an epoch more for the statistics of BatchNorm.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment
from tests.support.jobs import job

SCRIPT = """
import json, sys, lightning, torch, torch_ps
from accelerate import Accelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

torch_ps.alone()
torch.set_num_threads(1)
torch.manual_seed(3)
data = [{"x": x, "labels": i} for i, x in enumerate(torch.randn(32, 4))]
servers = iter(sys.argv[1:])

class Net(torch.nn.Module):
    def __init__(self, norm=torch.nn.Tanh):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), norm(), torch.nn.Linear(8, 1))
    def forward(self, x, labels=None):
        return {"loss": (self.layers(x) - 1).square().mean()}

class Module(lightning.LightningModule):
    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.given = net, lambda: optimizer  # an optimizer cannot be copied, and averaging copies the module
    def training_step(self, batch):
        return self.net(**batch)["loss"]
    def configure_optimizers(self):
        return self.given()

def with_trainer(net, optimizer, *, batch_size=4, passes=1):
    arguments = TrainingArguments(
        "out", num_train_epochs=2, per_device_train_batch_size=batch_size, gradient_accumulation_steps=passes,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=0,
        lr_scheduler_type="constant",
    )
    Trainer(net, arguments, train_dataset=data, optimizers=(optimizer, None)).train()

def with_accelerate(net, optimizer):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, stepper, loader = accelerator.prepare(net, optimizer, DataLoader(data, batch_size=4))
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                stepper.step()
                stepper.zero_grad()

def fit(net, optimizer, epochs, callback):
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )
    trainer.fit(Module(net, optimizer), DataLoader(data, batch_size=4))

def with_lightning(net, optimizer):
    fit(net, optimizer, 2, GradientAccumulationScheduler({0: 3, 1: 2}))

def with_averaged_weights(net, optimizer):
    fit(net, optimizer, 4, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1))

def trained(train, served=False, accumulate=1, norm=torch.nn.Tanh, **options):
    net = Net(norm)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    if not served:
        train(net, optimizer, **options)
    else:
        with torch_ps.ParameterServerOptimizer(optimizer, net, next(servers), accumulate=accumulate) as optimizer:
            train(net, optimizer, **options)
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()])

def differ(one, other):
    return float((one - other).norm() / other.norm())

norm = lambda: torch.nn.BatchNorm1d(8)
found = {
    "Trainer": differ(trained(with_trainer, True, passes=2), trained(with_trainer, passes=2)),
    "Accelerate": differ(trained(with_accelerate, True), trained(with_accelerate)),
    "Lightning": differ(trained(with_lightning, True), trained(with_lightning)),
    "averaged weights": differ(
        trained(with_averaged_weights, True, norm=norm), trained(with_averaged_weights, norm=norm)
    ),
    "Trainer, accumulate=2": differ(trained(with_trainer, True, 2), trained(with_trainer, batch_size=8)),
}
print(json.dumps(found))
"""


def test_accumulated_passes_and_averaged_weights_are_those_of_the_trainer_without_servers(tmp_path: Path) -> None:
    for library in ("transformers", "accelerate", "lightning"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(job()) for _ in range(5)]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, jobs)],
            cwd=tmp_path,
            env={**environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("Trainer, accumulate=2") < 1e-5  # sums of two means against means of all
    assert found == {"Trainer": 0, "Accelerate": 0, "Lightning": 0, "averaged weights": 0}
