"""Trainer, Accelerate, Lightning and Fabric on two workers: each sample once an epoch, evaluation on all samples.

The script is what a user writes for one process, with ``torch_ps.alone()`` and the wrapped optimizer; one after the
other, each trainer goes on with the same job. Both workers have the same seed. They print the samples of each epoch and
of each evaluation.
"""

import importlib.util
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, environment

SAMPLES, EPOCHS = 32, 2

SCRIPT = """
import json, torch, torch_ps
torch_ps.alone()
import lightning
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

SAMPLES, EPOCHS = 32, 2
torch.manual_seed(0)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(SAMPLES))
        self.seen = {True: [], False: []}
    def forward(self, index, labels=None):
        self.seen[self.training] += index.tolist()
        loss = (self.x[index] - 1).square().mean()
        return {"loss": loss, "logits": loss.detach().reshape(1)}
    def told(self, what, lr):
        size = len(self.seen[True]) // EPOCHS
        epochs = [self.seen[True][:size], self.seen[True][size:]]
        print(json.dumps([what, rank, epochs, self.seen[False], lr]), flush=True)
        self.seen = {True: [], False: []}

def loaders():
    return DataLoader(range(SAMPLES), batch_size=4, shuffle=True), DataLoader(range(5), batch_size=4)

def with_trainer():
    data = [{"index": i, "labels": i} for i in range(SAMPLES)]
    arguments = TrainingArguments(
        "out", num_train_epochs=EPOCHS, per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", eval_strategy="epoch", disable_tqdm=True,
    )
    trainer = Trainer(net, arguments, train_dataset=data, eval_dataset=data[:5], optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.global_step == 8, trainer.state.global_step
    assert arguments.process_index == rank and arguments.should_save == (rank == 0)
    net.told("Trainer", trainer.lr_scheduler.get_last_lr()[0])

def with_accelerate():
    loader, held_out = loaders()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS * len(loader))
    accelerator = Accelerator(cpu=True)
    model, stepper, loader, held_out, schedule = accelerator.prepare(net, optimizer, loader, held_out, schedule)
    assert accelerator.is_main_process == (rank == 0)
    for _ in range(EPOCHS):
        model.train()
        for index in loader:
            model(index)["loss"].backward()
            stepper.step()
            schedule.step()
            stepper.zero_grad()
        model.eval()
        for index in held_out:
            model(index)
    net.told("Accelerate", schedule.get_last_lr()[0])

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net
    def training_step(self, index):
        return self.net(index)["loss"]
    def validation_step(self, index):
        self.net(index)
    def configure_optimizers(self):
        return optimizer

def with_lightning():
    lightning.seed_everything(0)
    net.train()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Module(), *loaders())
    net.told("Lightning", 0.0)

def with_fabric():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    loader, held_out = fabric.setup_dataloaders(*loaders())
    for _ in range(EPOCHS):
        net.train()
        for index in loader:
            fabric.backward(net(index)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        net.eval()
        for index in held_out:
            net(index)
    net.told("Fabric", 0.0)

def refusal_of_skipping():
    try:
        skip_first_batches(torch_ps.shard(range(SAMPLES), optimizer, batch_size=4), 2)
    except AttributeError as error:
        return str(error)

net = Net()
with torch_ps.ParameterServerOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net) as optimizer:
    rank = optimizer.rank
    with_trainer()
    with_accelerate()
    with_lightning()
    with_fabric()
    assert "the servers give out the samples" in refusal_of_skipping()
"""

Told = tuple[str, int, list[list[int]], list[int], float]


def told_by_two_workers(folder: Path) -> list[Told]:
    file = folder / "script.py"
    file.write_text(SCRIPT, encoding="utf-8")
    done: Any = subprocess.run(
        [sys.executable, "-m", "torch_ps.worker.commands.run", "-n2", str(file)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seem to train on the same samples" not in done.stdout + done.stderr
    return [tuple(json.loads(line.partition("| ")[2])) for line in done.stdout.splitlines() if '| ["' in line]


def test_workers_of_a_trainer_see_each_sample_once_an_epoch_and_evaluate_on_all(tmp_path: Path) -> None:
    for library in ("transformers", "accelerate", "lightning"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    found = told_by_two_workers(tmp_path)
    for name in ("Trainer", "Accelerate", "Lightning", "Fabric"):
        mine = sorted(told for told in found if told[0] == name)
        assert [told[1] for told in mine] == [0, 1]
        for epoch in range(EPOCHS):
            assert sorted(chain(*(told[2][epoch] for told in mine))) == list(range(SAMPLES)), name
        for _, _, (first, second), evaluated, rate in mine:
            assert first != second, name  # each epoch has an order of its own
            assert evaluated == [0, 1, 2, 3, 4] * EPOCHS, name
            assert rate == pytest.approx(0, abs=1e-9), name  # the schedule has come to its end
