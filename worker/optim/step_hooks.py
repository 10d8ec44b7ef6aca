"""Hooks that were registered on the wrapped optimizer: they run where the wrapper does what the wrapped one would do.

torch calls the hooks of the object whose method is called, and a script may hold either. Hooks of the wrapper get the
wrapper, as torch calls them; hooks of the wrapped optimizer get that one. With local steps the wrapped optimizer steps
itself, so torch calls its step hooks.

Source: ``torch.optim.Optimizer.profile_hook_step`` and ``state_dict``, whose order and arguments these are.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Closure = Callable[[], Any]


@contextlib.contextmanager
def step_hooks(wrapped: torch.optim.Optimizer, closure: Closure | None) -> Iterator[Closure | None]:
    """Run the step hooks of ``wrapped`` around a step; gives the closure, which a hook may have replaced.

    Raises:
        RuntimeError: a hook returns what torch does not take either.
    """
    arguments: tuple[Any, ...] = (wrapped,) if closure is None else (wrapped, closure)
    keywords: dict[str, Any] = {}
    for hook in wrapped._optimizer_step_pre_hooks.values():
        if (changed := hook(wrapped, arguments, keywords)) is not None:
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(f"{hook} must return None or a tuple of (new_args, new_kwargs); got {changed!r}")
            arguments, keywords = changed
    yield keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
    for after in wrapped._optimizer_step_post_hooks.values():
        after(wrapped, arguments, keywords)


def state_dict_with_hooks(wrapped: torch.optim.Optimizer, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, with the state dict hooks of ``wrapped`` before and after."""
    for hook in wrapped._optimizer_state_dict_pre_hooks.values():
        hook(wrapped)
    found = make()
    for after in wrapped._optimizer_state_dict_post_hooks.values():
        if (changed := after(wrapped, found)) is not None:
            found = changed
    return found


def load_with_hooks(
    wrapper: torch.optim.Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Call ``load`` with the load hooks of ``wrapper`` before and after; those of the wrapped one are in ``load``."""
    state_dict = state_dict.copy()  # a hook may change it, as in torch
    for hook in wrapper._optimizer_load_state_dict_pre_hooks.values():
        if (changed := hook(wrapper, state_dict)) is not None:
            state_dict = changed
    load(state_dict)
    for after in wrapper._optimizer_load_state_dict_post_hooks.values():
        after(wrapper)
