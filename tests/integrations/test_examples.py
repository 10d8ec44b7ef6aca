"""The examples as users start them, and what Transformers and Lightning compute with a parameter server and without."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torch_ps
from tests.support.commands import ROOT, environment
from tests.support.jobs import job

EXAMPLES = ROOT / "examples"

TRANSFORMERS = """
import torch, torch_ps
from examples.transformers_gpt2 import OnServers, Trainer, model_of, pieces, train
from torch_ps.worker.leased_data import order_of

class Alone(Trainer):
    def get_train_dataloader(self):
        order = order_of(len(self.train_dataset), shuffle=True, seed=0).tolist()
        more = {"sampler": order, "collate_fn": self.data_collator}
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, **more)

torch_ps.alone()
torch.set_num_threads(1)
data, plain, served = pieces()[:400], model_of(), model_of()
def adamw(model): return torch.optim.AdamW(model.parameters(), lr=1e-3)
loss = train(Alone, plain, adamw(plain), data, 20)
with torch_ps.ParameterServerOptimizer(adamw(served), served) as optimizer:
    same = loss == train(OnServers, served, optimizer, data, 20)
    same &= all(map(torch.equal, plain.state_dict().values(), served.state_dict().values()))
print("same" if same else "not the same")
"""

LIGHTNING = """
import torch, torch_ps
from examples.lightning_digits import Network, digits, train
from torch_ps.worker.leased_data import order_of

class Alone(Network):
    epochs = 0
    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [sgd], [torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)]
    def train_dataloader(self):
        return Epochs()

class Epochs:
    def __init__(self): self.epoch = -1
    def __iter__(self):
        self.epoch += 1
        data = digits.read()[0]
        order = order_of(len(data), shuffle=True, seed=self.epoch).tolist()
        return iter(torch.utils.data.DataLoader(data, batch_size=32, sampler=order))

torch_ps.alone()
torch.set_num_threads(1)
plain, served = Alone(), Network()
train(plain, 2)
train(served, 2)
served.optimizer.close()
print("same" if all(map(torch.equal, plain.state_dict().values(), served.state_dict().values())) else "not the same")
"""


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def ps_run(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch_ps.worker.commands.run", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_numbers(output: str, words: str) -> list[float]:
    """The number at the end of every line that has ``words``."""
    return [float(line.split()[-1].rstrip("%")) for line in output.splitlines() if words in line]


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_shorter_than_80_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 80


@installed("transformers")
def test_transformers_trains_on_two_workers() -> None:
    losses = last_numbers(ps_run("-n2", "examples/transformers_gpt2.py", "--steps", "30"), "mean loss of 30 steps")
    assert len(losses) == 2
    assert max(losses) < 4.6  # of 5.55 to begin with, ln 256


@installed("lightning")
def test_lightning_trains_on_two_workers() -> None:
    right = last_numbers(ps_run("-n2", "examples/lightning_digits.py", "--epochs", "4"), "accuracy")
    assert len(right) == 2
    assert min(right) > 90


@installed("PIL")
def test_resnet_trains_on_images_of_a_folder_in_mixed_precision(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(96):
        folder = tmp_path / ("dark", "bright")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (number % 2 * 150 + number,) * 3).save(folder / f"{number}.png")
    said = ps_run("-n2", "examples/resnet_folder.py", str(tmp_path), "--epochs", "2", "--amp")
    counts = [line.split() for line in said.splitlines() if "epoch 2: " in line]
    right, seen = (sum(int(words[at]) for words in counts) for at in (4, 6))
    assert seen == 96
    assert right > 80


@pytest.mark.parametrize("script", [TRANSFORMERS, LIGHTNING], ids=["transformers", "lightning"])
def test_one_worker_computes_the_bits_of_training_without_servers(script: str, request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec(request.node.callspec.id) is None:
        pytest.skip(f"{request.node.callspec.id} is not installed")
    with job(mode="sync", workers=1) as servers:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**environment(), "PS_SERVERS": str(servers), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1:] == ["same"], done.stdout
        assert servers.status().version >= 20


def test_alone_hides_a_launcher_from_other_libraries_and_keeps_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "SLURM_NTASKS": "4"}
    for name, value in {**told, "CUDA_VISIBLE_DEVICES": "2,5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PS_RANK", raising=False)
    monkeypatch.delenv("PS_WORLD", raising=False)
    torch_ps.alone()
    assert not set(told) & set(os.environ)
    assert (os.environ.pop("PS_RANK"), os.environ.pop("PS_WORLD")) == ("3", "4")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
