"""``trainer.train(resume_from_checkpoint=True)`` after servers and trainer have died: the bits of one that went on.

The trainer's checkpoint has weights, schedule and place in the data, the servers' one the state of the optimizer.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment
from tests.support.jobs import until
from tests.support.restart import shards

SCRIPT = """
import contextlib, torch, torch_ps
from transformers import Trainer, TrainerCallback, TrainingArguments

torch_ps.alone()
data = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i)), "labels": i} for i in range(16)]

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
    def forward(self, x, labels=None):
        return {"loss": (self.layer(x) - 1).square().mean()}

class Dies(TrainerCallback):
    def on_step_end(self, arguments, state, control, **more):
        if state.global_step == 5:
            raise KeyboardInterrupt

def train(net, optimizer, folder, *callbacks, resume=None):
    arguments = TrainingArguments(
        folder, num_train_epochs=3, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_steps=3,
        disable_tqdm=True,
    )
    trainer = Trainer(net, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 12

def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

plain, first, second = Net(), Net(), Net()
train(plain, sgd(plain), "plain")
with (
    contextlib.suppress(KeyboardInterrupt),
    torch_ps.ParameterServerOptimizer(sgd(first), first, name="w0") as optimizer,
):
    train(first, optimizer, "served", Dies())
print("died", flush=True)
input()
with torch_ps.ParameterServerOptimizer(sgd(second), second, name="w0") as optimizer:
    train(second, optimizer, "served", resume=True)
same = all(map(torch.equal, plain.state_dict().values(), second.state_dict().values()))
print("same" if same else "not the same")
"""


def test_trainer_that_resumes_with_the_servers_has_the_bits_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    with shards(1, checkpoint=str(tmp_path / "servers"), checkpoint_every=3) as servers:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=tmp_path,
            env={
                **environment(),
                "PYTHONPATH": str(ROOT),
                "PS_SERVERS": str(servers),
                "PS_NAME": "w0",
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            try:
                assert process.stdout is not None
                said = []
                for line in process.stdout:
                    said.append(line)
                    if line == "died\n":
                        break
                assert said[-1:] == ["died\n"], "".join(said)
                until(lambda: servers.status().checkpoint.version == 3, "the checkpoint of version 3 is good")
                servers.kill()
                servers.start(resume=True)
                rest, _ = process.communicate("\n", timeout=120)
            finally:
                process.kill()
        assert rest.split()[-1:] == ["same"], "".join(said) + rest
        assert "saved at version" not in rest
        assert servers.status().version == 12
        servers.stop()
