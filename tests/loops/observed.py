"""Runs a loop and notes what there is after each line of it: parameters, buffers, gradients, rates, local variables.

The loop is left as it is; Python's tracing says when a line is done. Two runs are the same when they have gone the same
way, with the same bits after each line.
"""

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from tests.loops.run import Loop, Run

#: After which lines there is a look at everything, by the text of the line.
Look = Callable[[str], bool]


@dataclass(frozen=True)
class Moment:
    """All values after one line; ``line`` is its number and text."""

    line: str
    values: dict[str, Any] = field(repr=False)


def everything(line: str) -> bool:
    """After each line."""
    return True


def nothing(line: str) -> bool:
    """Only after the last one."""
    return False


def observe(loop: Loop, run: Run, look: Look) -> tuple[list[Moment], BaseException | None]:
    """Run a loop; what was seen, and the error that it ended with."""
    moments: list[Moment] = []
    code = loop.__code__
    before, failed = 0, False

    def traced(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal before, failed
        if event == "line" or (event == "return" and not failed):
            note(frame)
            before = frame.f_lineno
        failed = event == "exception"
        return traced

    def note(frame: FrameType) -> None:
        text = linecache.getline(code.co_filename, before).strip()
        if before and look(text):
            moments.append(Moment(f"{before}: {text}", values(run, frame.f_locals)))

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        return traced if frame.f_code is code else None

    torch.set_num_threads(1)  # a thread has a number of its own, which decides how sums round
    error: BaseException | None = None
    outer = sys.gettrace()
    if look is not nothing:
        sys.settrace(called)
    try:
        loop(run)
    except Exception as caught:  # noqa: BLE001 - judged by whoever asked
        error = caught
    finally:
        sys.settrace(outer)
    return moments, error


def end(run: Run) -> Moment:
    """All values when the loop is done."""
    return Moment("end", values(run, {}))


def values(run: Run, local: dict[str, Any]) -> dict[str, Any]:
    """Copies of all that has to be the same, by name."""
    found: dict[str, Any] = {}
    for name, parameter in run.model.named_parameters():
        found[name] = copied(parameter)
        found[f"{name}.grad"] = None if parameter.grad is None else copied(parameter.grad)
    for name, buffer in run.model.named_buffers():
        found[name] = copied(buffer)
    for number, group in enumerate(run.optimizer.param_groups):
        found |= {f"group {number}: {key}": copied(value) for key, value in group.items() if key != "params"}
    found |= {f"note {name}": copied(value) for name, value in run.notes.items()}
    for name, value in local.items():
        if not name.startswith("_") and isinstance(value, torch.Tensor | float | int | str):
            found[f"variable {name}"] = copied(value)
    return found


def copied(value: Any) -> Any:
    """A copy of a value as it is now."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.to_dense() if value.layout is not torch.strided else value).clone()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what has not the same bits."""
    return [name for name in {**one, **other} if not same(one.get(name), other.get(name))]


def same(one: Any, other: Any) -> bool:
    """Whether two values have the same bits."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def first_difference(plain: list[Moment], served: list[Moment], *, gradients: bool = True) -> str:
    """Where two runs part, in words; "" if they are the same, with or without their gradients."""
    for before, after in zip(plain, served, strict=False):
        if before.line != after.line:
            return f"after {before.line!r} comes {after.line!r}"
        found = differences(before.values, after.values)
        if found := [name for name in found if gradients or not name.endswith(".grad")]:
            return f"after {after.line!r}: {', '.join(found)}"
    if len(plain) != len(served):
        return f"{len(served)} lines instead of {len(plain)}"
    return ""
