"""Optimizers by name: a class name and plain hyperparameters cross the wire, never code.

The server builds the same ``torch.optim`` class over slices of the flat parameter vector. That is correct for
optimizers whose update is elementwise; these are listed here, and any other (Adafactor, Muon, LBFGS, ...) is refused.

Hyperparameters may change from step to step; they are sent with each push. Values that a constructor of torch refuses
are refused in torch's words where an optimizer is made. A change in ``param_groups`` torch does not check, and so a
negative lr counts then, as in torch; what would fail in the middle of a step is refused here before anything changes.
A table (``_check_values``) gives types and bounds. No table says of every value whether a step of torch takes it, so
values outside of what is ordinary are tried: torch's own optimizer makes some steps with them on one element.

The user chooses torch's implementation as in one process: with ``fused=True`` the fused kernel, which for Adam is about
three times faster on a CPU and rounds differently, with ``foreach=True`` the one for many tensors, which rounds
differently for NAdam, RAdam and ASGD, else the plain one. A tensor stays a tensor (``typed_numbers.py``). So one worker
with servers gets the same bits as the optimizer alone.
"""

import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from torch_ps.common.errors import ConfigError, ProtocolError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.typed_numbers import TypedNumber, plain_or_typed

HyperValue = float | int | bool | str | None | TypedNumber | tuple[float | TypedNumber, ...]
Hyper = dict[str, HyperValue]

#: Optimizers whose update of an element depends on that element's gradient and state only.
ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "RMSprop",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adadelta",
    "Rprop",
    "ASGD",
)

#: Hyperparameters that decide which state an optimizer keeps, and so cannot change after its first step.
STRUCTURAL = ("amsgrad", "centered", "fused")
#: Hyperparameters that torch takes from the constructor only, even if a group has its own.
_OF_ALL_GROUPS = ("initial_accumulator_value",)
#: Bound of a hyperparameter: products and quotients within it stay in fp32; an overflow would fail in a step.
LARGEST = 1e20
#: Ranges in which numbers that schedulers change at every step need no trial: no step of any class fails on them.
ORDINARY = {"lr": (-1e6, 1e6), "weight_decay": (-1e6, 1e6), "momentum": (-1e6, 1e6), "betas": (0.0, 0.99999)}
#: Most trials for one model: about a quarter of a second.
MAX_TRIALS = 256
#: Steps of a trial, enough for every branch that the number of steps decides (RAdam's fifth step is the last one).
_TRIAL_STEPS = 8
#: Most hyperparameters of a group and numbers in one of them; most characters of a name or a text.
MAX_HYPER, MAX_TEXT = 64, 200

#: Arguments that do not cross the wire: with "capturable" torch computes on a GPU what else Python computes, and
#: "differentiable" is refused.
_RUNTIME = frozenset({"capturable", "differentiable"})
#: Hyperparameters that torch's constructors refuse below 0 and its steps compute with.
_SIGNED = ("lr", "weight_decay", "momentum")


class OptimizerSpec:
    """A ``torch.optim`` class by name and the hyperparameters to build it with.

    >>> OptimizerSpec("SGD", lr=0.1, momentum=0.9)
    OptimizerSpec('SGD', lr=0.1, momentum=0.9)

    Raises:
        ConfigError: the class is not elementwise, an argument is unknown to it, or torch refuses a value.
    """

    def __init__(self, name: str, **hyper: HyperValue) -> None:
        self.name = name
        self.hyper: Hyper = {k: _plain(name, k, v) for k, v in hyper.items() if k not in _RUNTIME}
        check(name, self.hyper, new=True)

    def __repr__(self) -> str:
        arguments = "".join(f", {k}={v!r}" for k, v in self.hyper.items())
        return f"OptimizerSpec({self.name!r}{arguments})"


def describe(optimizer: torch.optim.Optimizer) -> tuple[str, list[Hyper]]:
    """Class name, and hyperparameters of each group, of a live optimizer.

    Raises:
        ConfigError: its class is not an elementwise one of ``torch.optim``.
    """
    name = type(optimizer).__name__
    if getattr(torch.optim, name, None) is not type(optimizer):
        raise ConfigError(f"{type(optimizer).__module__}.{name} is not a class of torch.optim; {_choices()}")
    known = arguments_of(name)
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ConfigError(
            f"torch.optim.{name}: differentiable=True cannot be served: no autograd graph crosses the servers"
        )
    common = {key: value for key, value in optimizer.defaults.items() if key in _OF_ALL_GROUPS}
    return name, [hyper_of(name, {**group, **common}, known) for group in optimizer.param_groups]


def hyper_of(name: str, group: Mapping[str, object], known: frozenset[str]) -> Hyper:
    """The hyperparameters in one entry of ``param_groups``; other keys (``initial_lr``, ...) are left out."""
    return {
        key: bool(value) if key == "foreach" else _plain(name, key, value)
        for key, value in group.items()
        if key in known
    }


def arguments_of(name: str) -> frozenset[str]:
    """Names of the hyperparameters that the class takes and the server applies.

    Raises:
        ConfigError: the class is not elementwise.
    """
    if name not in ELEMENTWISE:
        raise ConfigError(f"torch.optim.{name} cannot run on slices of the parameters; {_choices()}")
    return frozenset(_defaults(name)) - _RUNTIME


def live(hyper: Hyper) -> dict[str, Any]:
    """The hyperparameters as ``param_groups`` has them: typed numbers are tensors and scalars of numpy again."""
    return {key: _live(value) for key, value in hyper.items()} if any(map(_is_typed, hyper.values())) else hyper


def build(
    name: str, tensors: list[torch.Tensor], hyper: Mapping[str, HyperValue], *, new: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer over ``tensors``.

    Args:
        name: class of the optimizer.
        tensors: tensors that it steps.
        hyper: its hyperparameters.
        new: whether to refuse what torch's constructor refuses; else also what a running optimizer may be set to is
            taken, such as a negative lr.

    Raises:
        ConfigError: the class has no such argument, or torch refuses a value; says which.
    """
    _check_names(name, hyper)
    _check_values(name, hyper)
    arguments = {key: _live(value) for key, value in hyper.items()}
    # Without foreach=False torch may pick an implementation that rounds differently.
    runtime: dict[str, Any] = {} if hyper.get("fused") else {"foreach": bool(hyper.get("foreach"))}
    if not new:
        runtime |= {key: abs(arguments[key]) for key in _SIGNED if key in arguments}
        if "nesterov" in arguments:
            runtime["nesterov"] = False
    try:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(tensors, **{**arguments, **runtime})
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"torch.optim.{name} refuses its arguments: {error}") from error
    optimizer.param_groups[0].update({key: arguments[key] for key in runtime if key in arguments and key != "foreach"})
    return optimizer


def check(name: str, hyper: Mapping[str, HyperValue], *, new: bool = False) -> None:
    """Check that an optimizer can be built with ``hyper`` and make its steps.

    Args:
        name: class of the optimizer.
        hyper: its hyperparameters.
        new: whether to refuse what torch's constructor refuses, as ``build`` does.

    Raises:
        ConfigError: the class is not elementwise, has no such argument, or fails with these values; says which and why.

    Cost: about a millisecond.
    """
    build(name, [torch.zeros(1, device="cpu")], hyper, new=new)
    _try_steps(name, hyper, hyper)


def check_groups(name: str, groups: Iterable[Mapping[str, HyperValue]]) -> None:
    """Check the hyperparameters of every group of one optimizer, as ``check`` does.

    Raises:
        ConfigError: as ``check``; or more than ``MAX_TRIALS`` sets would have to be tried.
    """
    tried = set[str]()
    for hyper in groups:
        _check_names(name, hyper)
        _check_values(name, hyper)
        apart = {key: value for key, value in hyper.items() if not _is_ordinary(key, value)}
        unusual = repr(sorted(apart.items()))  # not the values: True equals 1, and 1.0
        if unusual not in tried:
            if len(tried) == MAX_TRIALS:
                raise ConfigError(
                    f"torch.optim.{name}: more than {MAX_TRIALS} parameter groups differ in more than "
                    f"{', '.join(ORDINARY)}"
                )
            check(name, hyper)
            tried.add(unusual)


def check_change(name: str, job: Mapping[str, HyperValue], hyper: Mapping[str, HyperValue]) -> None:
    """Check that an optimizer built with ``job``, which is checked, can make its next steps with ``hyper``.

    Raises:
        ConfigError: a value cannot change so; says which and why.

    Cost: microseconds where only ``ORDINARY`` numbers differ, else about a millisecond; call it only when a value has
    changed.
    """
    _check_names(name, hyper)
    _check_values(name, hyper)
    for key in STRUCTURAL:
        if bool(hyper.get(key)) != bool(job.get(key)):
            raise ConfigError(
                f"torch.optim.{name}: {key} is {bool(job.get(key))} in this job and cannot change while it runs"
            )
    if name == "RMSprop" and _positive(hyper.get("momentum")) != _positive(job.get("momentum")):
        raise ConfigError(
            f"torch.optim.RMSprop: momentum cannot change from {job.get('momentum', 0)} to {hyper.get('momentum', 0)} "
            "while the job runs: its buffers exist from the start or never; a small momentum from the start may change"
        )
    if not all(_is_ordinary(key, value) for key, value in hyper.items() if key not in job or job[key] != value):
        build(name, [torch.zeros(1, device="cpu")], hyper)
        _try_steps(name, job, hyper)


def changed_values(mine: Hyper, job: Hyper) -> Hyper:
    """The values of ``mine`` that differ from the job's; they are sent with every push."""
    return {key: value for key, value in mine.items() if key not in job or job[key] != value}


def hyper_to_proto(hyper: Mapping[str, HyperValue]) -> dict[str, pb.HyperValue]:
    return {key: _value_to_proto(value) for key, value in hyper.items()}


def hyper_from_proto(message: Mapping[str, pb.HyperValue]) -> Hyper:
    """Read hyperparameters that came over the wire.

    Raises:
        ProtocolError: a value is missing, not finite or too long, or there are too many.
    """
    if len(message) > MAX_HYPER or any(len(key) > MAX_TEXT for key in message):
        raise ProtocolError(f"{len(message)} hyperparameters, or one with a name of more than {MAX_TEXT} characters")
    return {key: _value_from_proto(key, value) for key, value in message.items()}


def changes_from_proto(name: str, message: Mapping[str, pb.HyperValue]) -> Hyper:
    """Read the hyperparameters of a push, each of the type that its optimizer takes.

    Raises:
        ProtocolError: as ``hyper_from_proto``, or the class has no such argument, or a value has another type.
    """
    found = hyper_from_proto(message)
    try:
        _check_names(name, found)
        _check_values(name, found)
    except ConfigError as error:
        raise ProtocolError(str(error)) from None
    return found


@functools.cache
def _defaults(name: str) -> Mapping[str, object]:
    """Every argument of the class, except the parameters, with its default."""
    found = inspect.signature(getattr(torch.optim, name).__init__).parameters
    return {key: parameter.default for key, parameter in found.items() if key not in ("self", "params")}


def _check_names(name: str, hyper: Mapping[str, HyperValue]) -> None:
    if unknown := set(hyper) - arguments_of(name):
        raise ConfigError(f"torch.optim.{name} has no argument {min(unknown)!r}")


def _try_steps(name: str, job: Mapping[str, HyperValue], hyper: Mapping[str, HyperValue]) -> None:
    """Make steps of one element with ``hyper``: the first ones, and later ones of an optimizer built with ``job``.

    Raises:
        ConfigError: torch fails in one of them.
    """
    for begin in ([hyper] * _TRIAL_STEPS, [job, *[hyper] * _TRIAL_STEPS, job, hyper]):
        parameter = torch.ones(1, device="cpu")
        optimizer = build(name, [parameter], begin[0])
        group = optimizer.param_groups[0]
        first = {key: value for key, value in group.items() if key != "params"}
        for number, values in enumerate(begin):
            group.update(first)
            group.update(live(dict(values)))
            if number % 2:  # as where the rate shrinks with staleness
                group["lr"] = group["lr"] * 0.5
            parameter.grad = torch.ones_like(parameter)
            try:
                optimizer.step()
            except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, LookupError) as error:
                raise ConfigError(f"torch.optim.{name} cannot make a step with {_shown(hyper)}: {error}") from None


def _shown(hyper: Mapping[str, HyperValue]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in hyper.items())


def _is_ordinary(key: str, value: HyperValue) -> bool:
    """Whether no step fails on a checked value, whatever the others are."""
    if key not in ORDINARY:
        return False
    low, high = ORDINARY[key]
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(each, int | float) and low <= each <= high for each in numbers)


def _check_values(name: str, hyper: Mapping[str, HyperValue]) -> None:
    """Refuse values that torch's constructors accept and its steps fail on.

    Raises:
        ConfigError: a value has the wrong type or is too large; names it.
    """
    for key, value in hyper.items():
        default = _defaults(name)[key]
        match default:
            case None | bool():
                right, wanted = value is None or isinstance(value, bool), "True or False"
            case tuple():
                right = isinstance(value, tuple) and len(value) == len(default) and all(map(_is_number, value))
                wanted = f"{len(default)} numbers"
            case _:
                right, wanted = _is_number(value), "a number"
        if not right:
            raise ConfigError(f"torch.optim.{name}: {key} is {value!r}; it has to be {wanted}, at most 1e20")
    if name == "ASGD":  # lr / (1 + lambd lr t)**alpha has to stay real and finite
        for key, most in (("lr", LARGEST), ("lambd", LARGEST), ("alpha", 5.0)):
            value = hyper.get(key, 0.0)
            if not 0 <= number_of(value) <= most:
                raise ConfigError(f"torch.optim.ASGD: {key} has to be in [0, {most:g}]; got {number_of(value)}")


def number_of(value: HyperValue, default: float = math.nan) -> float:
    """A hyperparameter as a number of Python's; ``default`` if it is none."""
    return float(value) if isinstance(value, int | float | TypedNumber) else default


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or (isinstance(value, TypedNumber) and value.type == "torch.bool"):
        return False  # numbers to Python, and no factors to torch
    return isinstance(value, int | float | TypedNumber) and abs(value) <= LARGEST  # not so for NaN


def _positive(value: HyperValue) -> bool:
    return number_of(value, 0.0) > 0


def _is_typed(value: HyperValue) -> bool:
    return isinstance(value, TypedNumber) or (isinstance(value, tuple) and any(map(_is_typed, value)))


def _live(value: HyperValue) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_live, value))
    return value.live() if isinstance(value, TypedNumber) else value


def _choices() -> str:
    return f"these work: {', '.join(ELEMENTWISE)}; any other does with local_steps, which run on the workers"


def _plain(name: str, key: str, value: object) -> HyperValue:
    try:
        found = plain_or_typed(value)
    except ValueError as error:
        raise ConfigError(f"torch.optim.{name}: {key}={value!r} cannot be sent: {error}") from None
    if isinstance(found, int) and found.bit_length() > 63:
        raise ConfigError(f"torch.optim.{name}: {key}={value!r} does not fit into 64 bits")
    if found is None or isinstance(found, (bool, int, float, str, TypedNumber)):
        return found
    if isinstance(found, tuple) and all(isinstance(each, int | float | TypedNumber) for each in found):
        try:
            return tuple(each if isinstance(each, TypedNumber) else float(each) for each in found)
        except OverflowError as error:
            raise ConfigError(f"torch.optim.{name}: {key}={value!r} cannot be sent: {error}") from None
    raise ConfigError(f"torch.optim.{name}: {key}={value!r} cannot be sent; numbers, flags and pairs of numbers can")


def _value_to_proto(value: HyperValue) -> pb.HyperValue:
    match value:
        case None:
            return pb.HyperValue(none=True)
        case bool():
            return pb.HyperValue(flag=value)
        case int():
            return pb.HyperValue(integer=value)
        case float():
            return pb.HyperValue(number=value)
        case TypedNumber():
            return pb.HyperValue(number=float(value), type=value.type)
        case str():
            return pb.HyperValue(text=value)
        case _:
            types = [each.type if isinstance(each, TypedNumber) else "" for each in value]
            return pb.HyperValue(numbers=pb.NumberList(value=map(float, value), type=types if any(types) else ()))


def _value_from_proto(key: str, message: pb.HyperValue) -> HyperValue:
    match message.WhichOneof("value"):
        case "none":
            return None
        case "flag":
            return message.flag
        case "integer":
            return message.integer
        case "number":
            if not math.isfinite(message.number):
                raise ProtocolError(f"hyperparameter {key!r} is {message.number}; a finite number is needed")
            return _typed_from_proto(key, message.type, message.number)
        case "text" if len(message.text) <= MAX_TEXT:
            return message.text
        case "numbers" if len(message.numbers.value) <= MAX_HYPER:
            values, types = message.numbers.value, message.numbers.type or [""] * len(message.numbers.value)
            if len(types) != len(values):
                raise ProtocolError(f"hyperparameter {key!r} has {len(values)} numbers and {len(types)} types")
            return tuple(_typed_from_proto(key, *pair) for pair in zip(types, values, strict=True))
        case _:
            raise ProtocolError(f"hyperparameter {key!r} has no value, or one that is too long")


def _typed_from_proto(key: str, kind: str, value: float) -> float | TypedNumber:
    try:
        return TypedNumber(kind, value) if kind else value
    except ValueError as error:
        raise ProtocolError(f"hyperparameter {key!r}: {error}") from None
