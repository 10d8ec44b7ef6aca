"""Optimizers by name: a class name and plain hyperparameters cross the wire, never code.

The server builds the same ``torch.optim`` class over slices of the flat parameter vector. That is correct for
optimizers whose update is elementwise; these are listed here, and any other (Adafactor, Muon, LBFGS, ...) is refused.

Hyperparameters may change from step to step; they are sent with each push. Values that torch would refuse, at the start
or in the middle of a step, are refused here before anything changes.

The user chooses torch's implementation as in one process: with ``fused=True`` the fused kernel, which for Adam is about
three times faster on a CPU and rounds differently, else the plain one. So one worker with servers gets the same bits as
the optimizer alone.
"""

import functools
import inspect
import math
from collections.abc import Mapping

import torch

from torch_ps.common.errors import ConfigError, ProtocolError
from torch_ps.common.pb import parameter_server_pb2 as pb

HyperValue = float | int | bool | str | None | tuple[float, ...]
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
#: Most hyperparameters of a group and numbers in one of them; most characters of a name or a text.
MAX_HYPER, MAX_TEXT = 64, 200

#: Arguments that decide how torch runs the update, not what it computes; the server chooses them. Not ``fused``.
_RUNTIME = frozenset({"foreach", "capturable", "differentiable"})


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
        build(name, [torch.zeros(1, device="cpu")], self.hyper)

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
    return {key: _plain(name, key, value) for key, value in group.items() if key in known}


def arguments_of(name: str) -> frozenset[str]:
    """Names of the hyperparameters that the class takes and the server applies.

    Raises:
        ConfigError: the class is not elementwise.
    """
    if name not in ELEMENTWISE:
        raise ConfigError(f"torch.optim.{name} cannot run on slices of the parameters; {_choices()}")
    return frozenset(_defaults(name)) - _RUNTIME


def build(name: str, tensors: list[torch.Tensor], hyper: Mapping[str, HyperValue]) -> torch.optim.Optimizer:
    """Build the optimizer over ``tensors``.

    Raises:
        ConfigError: the class has no such argument, or torch refuses a value; says which.
    """
    unknown = sorted(set(hyper) - arguments_of(name))
    if unknown:
        raise ConfigError(f"torch.optim.{name} has no argument {unknown[0]!r}")
    _check_values(name, hyper)
    fused = bool(hyper.get("fused"))
    try:
        # Without foreach=False torch may pick an implementation that rounds differently.
        runtime = {} if fused else {"foreach": False}
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(tensors, **hyper, **runtime)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"torch.optim.{name} refuses its arguments: {error}") from error
    return optimizer


def check_change(name: str, job: Mapping[str, HyperValue], hyper: Mapping[str, HyperValue]) -> None:
    """Check that an optimizer built with ``job`` can take its next step with ``hyper``.

    Raises:
        ConfigError: a value cannot change so; says which and why.

    Cost: tens of microseconds; call it only when a value has changed.
    """
    for key in STRUCTURAL:
        if bool(hyper.get(key)) != bool(job.get(key)):
            raise ConfigError(
                f"torch.optim.{name}: {key} is {bool(job.get(key))} in this job and cannot change while it runs"
            )
    build(name, [torch.zeros(1, device="cpu")], hyper)
    if name == "RMSprop" and bool(hyper.get("momentum")) != bool(job.get("momentum")):
        raise ConfigError(
            f"torch.optim.RMSprop: momentum cannot change from {job.get('momentum', 0)} to {hyper.get('momentum', 0)} "
            "while the job runs: its buffers exist from the start or never; a small momentum from the start may change"
        )


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


@functools.cache
def _defaults(name: str) -> Mapping[str, object]:
    """Every argument of the class, except the parameters, with its default."""
    found = inspect.signature(getattr(torch.optim, name).__init__).parameters
    return {key: parameter.default for key, parameter in found.items() if key not in ("self", "params")}


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
                right = isinstance(value, tuple) and len(value) == len(default) and all(map(_number, value))
                wanted = f"{len(default)} numbers"
            case _:
                right, wanted = _number(value), "a number"
        if not right:
            raise ConfigError(f"torch.optim.{name}: {key} is {value!r}; it has to be {wanted}, at most 1e20")
    if name == "ASGD":  # lr / (1 + lambd lr t)**alpha has to stay real and finite
        for key, most in (("lambd", LARGEST), ("alpha", 5.0)):
            value = hyper.get(key, 0.0)
            if not (isinstance(value, int | float) and 0 <= value <= most):
                raise ConfigError(f"torch.optim.ASGD: {key} has to be in [0, {most:g}]; got {value}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST  # not so for NaN


def _choices() -> str:
    return f"these work: {', '.join(ELEMENTWISE)}; any other does with local_steps, which run on the workers"


def _plain(name: str, key: str, value: object) -> HyperValue:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return tuple(float(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
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
        case str():
            return pb.HyperValue(text=value)
        case _:
            return pb.HyperValue(numbers=pb.NumberList(value=value))


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
            return message.number
        case "text" if len(message.text) <= MAX_TEXT:
            return message.text
        case "numbers" if len(message.numbers.value) <= MAX_HYPER:
            return tuple(message.numbers.value)
        case _:
            raise ProtocolError(f"hyperparameter {key!r} has no value, or one that is too long")
