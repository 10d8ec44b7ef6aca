"""What a wrapped optimizer and its wrapper share: ``param_groups``, and what scripts do with them beside training.

Rules of this file
  1. ``param_groups`` are one list of both: who has either object, as a schedule that was made before, changes both.
  2. State is shared where the wrapped optimizer steps, which is with local steps; else it lives on the servers, and
     whoever brings some is told that it stays unused.
"""

import logging
from collections import defaultdict
from typing import Any

import torch

from torch_ps.common.errors import PsError
from torch_ps.worker.optim.introspection import Facts

log = logging.getLogger("torch_ps.worker")


class Shared(Facts, torch.optim.Optimizer):
    """A part of ``ParameterServerOptimizer``, whose attributes these are."""

    wrapped: torch.optim.Optimizer
    _local_steps: int
    _settled = False  # while torch builds this object

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what the servers hold is settled when a worker joins.

        Raises:
            PsError: says what to do instead.
        """
        if self._settled:
            raise PsError(
                "a parameter group cannot be added once the job has begun; give the optimizer all groups before it is "
                "wrapped, and freeze those that are to wait with requires_grad_(False) afterwards"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the ``version``. There is state in it with local steps alone, else it is on the servers."""
        return {**super().state_dict(), "version": self.version}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, also what plain torch has saved; but state is used with local steps alone."""
        self.wait()
        if self._local_steps > 1:
            self.wrapped.load_state_dict(state_dict)
        else:
            self._unused(state_dict["state"], state_dict.get("version", 0))
            self.wrapped.load_state_dict({**state_dict, "state": {}})
        self._share()

    def _share(self) -> None:
        self.param_groups, self._settled = self.wrapped.param_groups, True
        self.state = self.wrapped.state if self._local_steps > 1 else defaultdict(dict)

    def _unused(self, state: dict[Any, Any], saved: int = 0) -> None:
        """Say so where somebody brings state, or has saved it at a version that the servers have not come to."""
        stepped = [each for each in state.values() if each.get("step", 1) > 0]  # Adagrad has some from the start
        if stepped:
            log.warning(
                "worker %s: the optimizer comes with state of %d parameters (momentum and the like), which is not "
                "used: the servers begin without, or with that of their checkpoint (ps-serve --resume)",
                self.name,
                len(stepped),
            )
        elif saved > self.version:
            log.warning(
                "worker %s: the optimizer was saved at version %d and the servers are at version %d: they go by their "
                "own state, which ps-serve --checkpoint DIR --resume brings back",
                self.name,
                saved,
                self.version,
            )
