"""What ``--task`` accepts, and what it says about the rest."""

from pathlib import Path

import pytest

from torch_ps.common.errors import ConfigError
from torch_ps.worker.tasks import READY_MADE, Task, load

OWN = """
import torch
from torch_ps.worker.tasks import Task

class Line(Task):
    default_lr = 0.5
    def model(self): return torch.nn.Linear(1, 1)
    def optimizer(self, model, lr): return torch.optim.SGD(model.parameters(), lr=lr)
    def batches(self, rank, world, batch_size, seed):
        while True: yield torch.ones(batch_size, 1)
    def loss(self, model, batch): return model(batch).mean()
    def evaluate(self, model): return {"loss": 0.0}

class Plain:
    model = optimizer = batches = loss = evaluate = lambda self, *a: "plain"

class Half(Task):
    model = optimizer = batches = lambda self: None

def with_data(data): task = Line(); task.name = "read " + data; return task
def nothing(): pass
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module in the current folder, another one for each test."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return name


def test_ready_made_tasks_know_their_names() -> None:
    assert [load(name).name for name in READY_MADE] == ["gpt", "digits", "digits:cnn"]


@pytest.mark.parametrize("name", ["gtp", "digits:", ":f", "digits-cnn"])
def test_an_unknown_task_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no task '{name}'; known are gpt, digits, digits:cnn, and module:function"):
        load(name)


def test_a_task_of_ones_own_comes_from_the_current_folder(module: str) -> None:
    task = load(f"{module}:Line")
    assert (task.name, task.default_lr, task.default_batch_size) == (f"{module}:Line", 0.5, 32)


def test_an_object_that_is_no_task_gets_the_defaults(module: str) -> None:
    task = load(f"{module}:Plain")
    assert isinstance(task, Task)
    assert str(task.model()) == str(task.evaluate(task.model())) == "plain"
    assert (task.default_batch_size, task.schedule(0.5), task.sample(task.model())) == (32, 1.0, None)


def test_data_goes_to_the_function_that_takes_it(module: str) -> None:
    assert load(f"{module}:with_data", "x").name == "read x"
    with pytest.raises(ConfigError, match="reads no data: Line takes no argument called data; got 'x'"):
        load(f"{module}:Line", "x")


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("Half", r"lacks loss\(\) and evaluate\(\)"),
        ("nothing", "nothing returned None"),
        ("number", "'number' is int, not a function or class"),
        ("gone", "has no 'gone'"),
    ],
)
def test_a_broken_task_is_refused_with_what_is_broken(module: str, function: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(f"{module}:{function}")


def test_a_module_that_cannot_be_imported_is_named_with_the_reason(tmp_path: Path, module: str) -> None:
    with pytest.raises(ConfigError, match="module 'not_there' cannot be imported: No module named 'not_there'"):
        load("not_there:task")
    (tmp_path / f"bad_{module}.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=rf"importing 'bad_{module}' failed: ZeroDivisionError: division by zero"):
        load(f"bad_{module}:task")
