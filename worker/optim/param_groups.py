"""What a wrapped optimizer and its wrapper share: ``param_groups`` and state.

Rules of this file
  1. Both have one list of ``param_groups``, so a scheduler built on either changes both.
  2. State is shared where the wrapped optimizer steps, which is with local steps. Elsewhere it lives on the servers,
     and a warning says that state which the worker brings stays unused.
"""

import logging
from collections import defaultdict
from typing import Any

import torch

log = logging.getLogger("torch_ps.worker")


class SharedParamGroups:
    """The groups and the state of one wrapped optimizer.

    Args:
        wrapped: optimizer that was wrapped.
        worker: name of the worker, for the log.
        steps_here: whether ``wrapped`` steps on this worker.
    """

    def __init__(self, wrapped: torch.optim.Optimizer, worker: str, *, steps_here: bool) -> None:
        self._wrapped, self._worker, self._steps_here = wrapped, worker, steps_here

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._wrapped.param_groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The state of the wrapped optimizer if it steps here; empty otherwise."""
        return self._wrapped.state if self._steps_here else defaultdict(dict)

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
