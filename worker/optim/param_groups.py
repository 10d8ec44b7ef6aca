"""What a wrapped optimizer and its wrapper share: ``param_groups`` and state.

Rules of this file
  1. Both have one list of ``param_groups``, so a scheduler built on either changes both.
  2. State is shared where the wrapped optimizer steps, which is with local steps. Elsewhere it lives on the servers,
     a warning says that state which the worker brings stays unused, and what would change it here is an error.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from torch_ps.common.errors import PsError
from torch_ps.worker.runtime.lifetime import Part

log = logging.getLogger("torch_ps.worker")


class StateOnServers(defaultdict[torch.Tensor, Any]):
    """What ``optimizer.state`` is where the servers have the state: empty, and nothing can be put in or removed.

    Args:
        begun: function that tells whether the servers may have state already; before, there is none to remove.
    """

    def __init__(self, begun: Callable[[], bool]) -> None:
        super().__init__(_NoState)
        self._begun = begun

    def clear(self) -> None:
        """Refuse to reset what the servers have.

        Raises:
            PsError: there may be state.
        """
        if self._begun():
            _refuse()

    def pop(self, *arguments: Any) -> Any:
        self.clear()
        return super().pop(*arguments)

    def popitem(self) -> Any:
        self.clear()
        return super().popitem()

    def __delitem__(self, parameter: torch.Tensor) -> None:
        self.clear()
        super().__delitem__(parameter)

    def __setitem__(self, parameter: torch.Tensor, value: Any) -> None:
        if not isinstance(value, _NoState):
            _refuse()
        super().__setitem__(parameter, value)

    def setdefault(self, parameter: torch.Tensor, default: Any = None) -> Any:
        return self[parameter] if parameter in self else _refuse()

    def update(self, *arguments: Any, **keywords: Any) -> None:
        if dict(*arguments, **keywords):
            _refuse()


class _NoState(dict[str, Any]):
    """The state of one parameter: empty, and nothing can be put in."""

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse()

    def setdefault(self, name: str, default: Any = None) -> Any:
        _refuse()

    def update(self, *arguments: Any, **keywords: Any) -> None:
        if dict(*arguments, **keywords):
            _refuse()


def _refuse() -> NoReturn:
    raise PsError(
        "the state of the optimizer (momentum and the like) lives on the servers and cannot be changed from a worker; "
        "to begin without state, save the model, start the servers anew without --resume, and load the model before "
        "the optimizer is made"
    )


class SharedParamGroups(Part):
    """The groups and the state of one wrapped optimizer.

    Args:
        wrapped: optimizer that was wrapped.
        worker: name of the worker, for the log.
        steps_here: whether ``wrapped`` steps on this worker.
        version: function that returns the version of the parameters.
        on_load: function that is called when the groups have become new objects, as ``load_state_dict`` of the wrapped
            optimizer makes them; not kept alive by this object.
    """

    def __init__(
        self,
        wrapped: torch.optim.Optimizer,
        worker: str,
        *,
        steps_here: bool,
        version: Callable[[], int],
        on_load: Callable[[], None],
    ) -> None:
        self._wrapped, self._worker, self._steps_here, self._version = wrapped, worker, steps_here, version
        self._state = wrapped.state if steps_here else StateOnServers(lambda: bool(version()))
        self._members = self._parameters()
        self._on_load = on_load
        self._handle = wrapped.register_load_state_dict_post_hook(self._loaded, prepend=True)

    def close(self) -> None:
        """Remove the hook: the wrapped optimizer is plain again."""
        self._handle.remove()

    def _parameters(self) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in self._wrapped.param_groups]

    def _loaded(self, wrapped: torch.optim.Optimizer) -> None:
        if self._steps_here:
            self._state = wrapped.state
        elif wrapped.state:
            self.warn_of_unused_state(wrapped.state, self._version())
        self._on_load()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._wrapped.param_groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The state of the wrapped optimizer if it steps here; else empty and not to be changed."""
        return self._state

    def check(self, wrapper: torch.optim.Optimizer) -> None:
        """Check that the groups have the parameters that the servers have, and that the wrapper still shares them.

        Raises:
            PsError: they differ; says what to do.
        """
        if wrapper.state is not self._state:
            _refuse()
        if wrapper.param_groups is not self._wrapped.param_groups or self._parameters() != self._members:
            raise PsError(
                f"the parameter groups of worker {self._worker!r} are not those that it joined the job with: groups or "
                "their parameters were added, removed or replaced, which the servers know nothing of; give the "
                "optimizer all parameters before it is wrapped, and freeze those that are to wait with "
                "requires_grad_(False) afterwards"
            )

    def load(self, state_dict: dict[str, Any], version: int) -> None:
        """Load what a wrapper or plain torch has saved; the groups and the state are new objects then.

        Args:
            state_dict: result of ``state_dict()``.
            version: version of the parameters in the model.
        """
        if self._steps_here:
            self._wrapped.load_state_dict(state_dict)
        else:
            self.warn_of_unused_state(state_dict["state"], version, state_dict.get("version", 0))
            self._wrapped.load_state_dict({**state_dict, "state": {}})

    def warn_of_unused_state(self, state: dict[Any, Any], version: int, saved: int = 0) -> None:
        """Warn if a worker brings state that no server uses, or has saved it at another version than the servers have.

        Args:
            state: state by parameter.
            version: version of the servers.
            saved: version at which the state was saved.
        """
        stepped = [each for each in state.values() if each.get("step", 1) > 0]  # Adagrad has some from the start
        if stepped:
            log.warning(
                "worker %s: the optimizer comes with state of %d parameters (momentum and the like), which is not "
                "used: the servers begin without, or with that of their checkpoint (ps-serve --resume)",
                self._worker,
                len(stepped),
            )
        elif saved not in (0, version):
            log.warning(
                "worker %s: the optimizer was saved at version %d and the servers are at version %d: they go by their "
                "own state (momentum and the like) of that version. ps-serve --checkpoint DIR --resume brings back the "
                "state of a checkpoint; one of version %d would match",
                self._worker,
                saved,
                version,
                saved,
            )
