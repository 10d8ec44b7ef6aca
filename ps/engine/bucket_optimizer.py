"""The optimizer of one bucket: a class of ``torch.optim`` over its flat parameters, cut only where it has to be.

    [ w w w w w w b b e e e e ]           one part, as long as every step has a gradient for every element
    [ w w w w w w | b b | e e e e ]       from the first step without a gradient for ``b``

torch leaves a parameter whose ``.grad`` is None alone: value, momentum, weight decay, counters. Here a *part*, elements
with one history, is one tensor of the optimizer with state of its own, and gets no gradient in such a step.

State as tensors. Every admitted optimizer (``common/optimizer_spec.py``) keeps elementwise tensors and counters of one
number, which their shapes tell apart:

    state/NAME      elementwise, shape (numel,); or a counter, shape (), where all elements have the same one
    counter/NAME    a counter by element, shape (numel,), where parts differ
    has_state       shape (numel,): 1 where the optimizer keeps state, 0 where it has made no step yet; absent: all do

Rules of this file
  1. No cut changes a bit: updates are elementwise, and a cut falls on an end of a tensor or on a multiple of ``ALIGN``
     within it.
  2. A part that has made no step has no state. Zeros in its place would not do: a first step is not dampened.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable
from itertools import pairwise

import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import ALIGN, Bucket

Tensors = dict[str, torch.Tensor]


class BucketOptimizer:
    """Steps the parameters of one bucket.

    Args:
        name: Class of ``torch.optim``.
        bucket: Bucket of the parameters.
        values: Parameters, fp32 of shape (numel,); changed in place.
        hyper: Hyperparameters of the bucket's group.
    """

    def __init__(self, name: str, bucket: Bucket, values: torch.Tensor, hyper: Hyper) -> None:
        self._values = values
        self._offsets = [piece.offset for piece in bucket.pieces]
        self._ends = [*self._offsets[1:], bucket.numel]
        # A fused kernel rounds the remainder of a tensor differently, so a cut there keeps the bits of separate
        # tensors. A cut after any other tensor would change no bits and cost 4 us a step.
        ends = [p.offset + p.stop - p.start for p in bucket.pieces if (p.stop - p.start) % ALIGN]
        self._fused = bool(hyper.get("fused"))
        self._place(ends if self._fused else ())
        self._torch = optim.build(name, self._parts, hyper)
        # What a step sets is of that step: a later one that does not name it, here or on a standby, finds this.
        self._begin = {key: value for key, value in self._torch.param_groups[0].items() if key != "params"}

    def step(self, mean: torch.Tensor, hyper: Hyper, lr_scale: float, absent: Collection[int] = ()) -> None:
        """Make one step.

        Args:
            mean: Gradient, fp32 of shape (numel,).
            hyper: Hyperparameters of this step; those that it leaves out are as in the beginning.
            lr_scale: Factor on the learning rate of this step alone.
            absent: Positions of the pieces without a gradient, which are left alone.
        """
        if absent:
            self._cut(self._edges(absent))
        group = self._torch.param_groups[0]
        group.update(self._begin)
        group.update(optim.live(hyper))
        rate = group["lr"]
        if lr_scale != 1.0:  # a factor of 1 would make another number of numpy's
            group["lr"] = rate * lr_scale
        gradients = torch.split(mean, self._sizes) if len(self._sizes) > 1 else (mean,)
        for part, piece, gradient in zip(self._parts, self._pieces, gradients, strict=True):
            part.grad = None if piece in absent else gradient
        if self._fused and len(self._parts) > 1:
            self._step_newcomers()
        self._torch.step()
        group["lr"] = rate
        for part in self._parts:
            part.grad = None

    def export(self) -> Tensors:
        """Copies of the state on the CPU."""
        states = [_tensors(self._torch.state.get(part, {})) for part in self._parts]
        first = next((state for state in states if state), {})
        alike = all(state and _same_counters(state, first) for state in states)
        found: Tensors = {}
        if first and not alike:
            found["has_state"] = self._by_element(torch.tensor(float(bool(state))) for state in states)
        for name, example in first.items():
            if example.dim():
                pairs = zip(states, self._parts, strict=True)
                found[f"state/{name}"] = _joined(s[name] if s else torch.zeros_like(part) for s, part in pairs)
            elif alike:
                found[f"state/{name}"] = example.to("cpu", copy=True)
            else:
                found[f"counter/{name}"] = self._by_element(s.get(name, torch.zeros_like(example)) for s in states)
        return found

    def restore(self, tensors: Tensors) -> None:
        """The inverse of ``export``, before the first step; ``tensors`` may hold other entries too."""
        state = _named(tensors, "state/")
        if not state:
            return
        counters, numel = _named(tensors, "counter/"), self._values.numel()
        has_state = tensors.get("has_state", torch.ones(numel))
        for each in (has_state, *counters.values()):
            bits = each.view(torch.int32)
            self._cut((bits[1:] != bits[:-1]).nonzero().flatten().add_(1).tolist())
        # torch keeps counters on the parameters' device for a kernel that steps all parts, else on the CPU.
        on_device = any(self._torch.defaults.get(each) for each in ("fused", "capturable"))
        for part, begin in zip(self._parts, self._starts, strict=True):
            if has_state[begin]:
                part_of = slice(begin, begin + part.numel())
                shared = {name: each[begin] for name, each in counters.items()}
                shared |= {name: each for name, each in state.items() if not each.dim()}
                own = {name: each[part_of].to(part.device, copy=True) for name, each in state.items() if each.dim()}
                device = part.device if on_device else "cpu"
                self._torch.state[part] = own | {n: each.to(device, copy=True) for n, each in shared.items()}

    def _step_newcomers(self) -> None:
        """Step the parts that make their first step by themselves: torch's fused SGD fails where only some do."""
        others = {part: part.grad for part in self._parts if _tensors(self._torch.state.get(part, {}))}
        if not others:
            return
        for part in others:
            part.grad = None
        if any(part.grad is not None for part in self._parts):
            self._torch.step()
        for part in self._parts:
            part.grad = others.get(part)

    def _edges(self, absent: Collection[int]) -> set[int]:
        """Where runs of pieces with and without a gradient meet."""
        edges: set[int] = set()
        for piece in absent:
            edges ^= {self._offsets[piece], self._ends[piece]}
        return edges - {0, self._values.numel()}

    def _place(self, cuts: Iterable[int]) -> None:
        """Divide the parameters at ``cuts``."""
        bounds = sorted({0, *cuts, self._values.numel()})
        self._starts = bounds[:-1]
        self._pieces = [
            bisect_right(self._offsets, start) - 1 for start in self._starts
        ]  # of each part's first element
        self._parts = [self._values[begin:end] for begin, end in pairwise(bounds)]
        self._sizes = [part.numel() for part in self._parts]

    def _cut(self, cuts: Collection[int]) -> None:
        """Divide the parameters at ``cuts`` too; each new part takes its share of the state."""
        if set(cuts) <= set(self._starts):
            return
        before = list(zip(self._starts, self._parts, strict=True))
        self._place([*self._starts, *cuts])
        state = self._torch.state
        old = {part: state.pop(part) for _, part in before if part in state}
        for part, start in zip(self._parts, self._starts, strict=True):
            begin, whole = before[bisect_right(before, start, key=lambda each: each[0]) - 1]
            for name, each in old.get(whole, {}).items():
                if isinstance(each, torch.Tensor):
                    at = start - begin
                    state[part][name] = (each[at : at + part.numel()] if each.dim() else each).clone()
                else:
                    state[part][name] = each
        self._torch.param_groups[0]["params"] = self._parts

    def _by_element(self, counters: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([each.cpu().expand(size) for each, size in zip(counters, self._sizes, strict=True)])


def by_element(tensors: Tensors, numel: int) -> Tensors:
    """The tensors of one bucket with counters and ``has_state`` by element, so that elements can move to other buckets.

    Args:
        tensors: Values and state of a bucket that an optimizer steps; other entries stay as they are.
        numel: Number of elements of the bucket.
    """
    given = float(any(name.startswith("state/") for name in tensors))
    found = {"has_state": torch.tensor(given).expand(numel)}
    for name, each in tensors.items():
        if name.startswith("state/") and not each.dim():
            found[f"counter/{name.removeprefix('state/')}"] = each.expand(numel)
        else:
            found[name] = each
    return found


def _tensors(state: dict[str, torch.Tensor | None]) -> Tensors:
    """Without None, which stands for a buffer that these hyperparameters do not use."""
    return {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}


def _named(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _same_counters(one: Tensors, other: Tensors) -> bool:
    return all(each.dim() or torch.equal(each, other[name]) for name, each in one.items())


def _joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors)).to("cpu", copy=True)
