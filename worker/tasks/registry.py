"""Lookup of ``--task``: a ready-made task by name, or ``module:function`` of the user.

Rules of this file
  1. A task knows torch and nothing of servers, ranks on other machines, clocks or files of events.
  2. This file imports torch only for the types of its signatures: to look up a name takes no time.
  3. An unknown name is refused with the list of known names; a broken task of the user with what is broken.

    "gpt", "digits", "digits:cnn"  -->  load()  -->  Task
    "my_module:my_task"            -->

A task of one's own derives from ``Task``, or is any object with the same methods:

    class Line(torch_ps.worker.tasks.Task):
        name, default_lr, default_batch_size = "line", 0.1, 16
        def model(self): return nn.Linear(1, 1)
        ...

    ps-run -n 2 --task my_module:Line
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.worker.tasks.base import Task

#: Without these a task cannot be trained; the others have a default in ``Task``.
REQUIRED = ("model", "optimizer", "batches", "loss", "evaluate")


def _gpt(data: str) -> Task:
    from torch_ps.worker.tasks.gpt import GptTask

    return GptTask(data)


def _digits(data: str) -> Task:
    from torch_ps.worker.tasks.digits import DigitsTask

    return DigitsTask("mlp", data)


def _digits_cnn(data: str) -> Task:
    from torch_ps.worker.tasks.digits import DigitsTask

    return DigitsTask("cnn", data)


#: Each imports its module only when asked for.
READY_MADE: dict[str, Callable[[str], Task]] = {"gpt": _gpt, "digits": _digits, "digits:cnn": _digits_cnn}


def load(name: str, data: str = "") -> Task:
    """The task called ``name``.

    Args:
        name: a ready-made task, or ``module:function``, where the module is found from the current folder or among the
            installed ones, and the function (or class) returns a task. It gets ``data=`` if it takes that.
        data: file or folder to read, "" for the task's own.

    Raises:
        ConfigError: no such task, its module cannot be imported, it lacks a method, or ``data`` is of no use to it.
    """
    check(name)
    if name in READY_MADE:
        return READY_MADE[name](data)
    module, _, function = name.partition(":")
    return _own(name, module, function, data)


def check(name: str) -> None:
    """Refuse what can be no task, without importing anything.

    Raises:
        ConfigError: neither a ready-made task nor of the form ``module:function``; lists what is known.
    """
    module, _, function = name.partition(":")
    if name not in READY_MADE and not (module and function):
        known = ", ".join(READY_MADE)
        raise ConfigError(f"there is no task {name!r}; known are {known}, and module:function for one of your own")


def _own(name: str, module: str, function: str, data: str) -> Task:
    make = _find(name, module, function)
    arguments: dict[str, str] = {}
    try:
        takes_data = "data" in inspect.signature(make).parameters
    except (TypeError, ValueError):
        takes_data = False
    if takes_data:
        arguments["data"] = data
    elif data:
        raise ConfigError(f"task {name!r} reads no data: {function} takes no argument called data; got {data!r}")
    task: Any = make(**arguments)
    if task is None:
        raise ConfigError(f"task {name!r}: {function} returned None; it has to return the task")
    # Every class has them through Task, so a method of Task itself counts as missing.
    missing = [
        each
        for each in REQUIRED
        if not callable(getattr(task, each, None)) or getattr(type(task), each, None) is getattr(Task, each)
    ]
    if missing:
        raise ConfigError(f"task {name!r} lacks {_listed(missing)}; torch_ps.worker.tasks.Task says what each does")
    complete = task if isinstance(task, Task) else _Adapted(task)
    complete.name = complete.name or name
    return complete


def _find(name: str, module: str, function: str) -> Callable[..., Any]:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"task {name!r}: module {module!r} cannot be imported: {error}") from error
    except Exception as error:
        raise ConfigError(f"task {name!r}: importing {module!r} failed: {type(error).__name__}: {error}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"task {name!r}: module {module!r} has no {function!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"task {name!r}: {function!r} is {type(found).__name__}, not a function or class")
    made: Callable[..., Any] = found
    return made


class _Adapted(Task):
    """An object that is not derived from ``Task``, with the defaults for what it lacks."""

    def __init__(self, task: Any) -> None:
        for each in ("name", "default_lr", "default_batch_size", *REQUIRED, "schedule", "sample"):
            if hasattr(task, each):
                setattr(self, each, getattr(task, each))


def _listed(names: list[str]) -> str:
    methods = [f"{each}()" for each in names]
    return methods[0] if len(methods) == 1 else ", ".join(methods[:-1]) + " and " + methods[-1]
