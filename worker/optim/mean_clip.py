"""``ParameterServerOptimizer.clip_grad_norm_``: clips by the norm of the mean gradient over all workers.

    .grad of each worker --> servers: norm of the mean --> each worker: .grad times min(1, max_norm / norm)
    the mean of what is pushed then is the clipped mean

Where no other worker's gradient is in the step (asynchronous modes, local steps, a worker that is alone), it is
torch's own clipping, with torch's bits.

Source: ``torch.distributed.fsdp.FullyShardedDataParallel.clip_grad_norm_``, which is collective in the same way.
"""

import logging
import math
from collections.abc import Callable, Iterable

import torch

from torch_ps.common.errors import ConfigError, StepConflict, UnknownWorker
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.gradients import Gradients
from torch_ps.worker.optim.clip_notice import ClipNotice
from torch_ps.worker.runtime.lifetime import Part
from torch_ps.worker.session.norm_questions import MeanNorm
from torch_ps.worker.session.session import Session

log = logging.getLogger("torch_ps.worker")

#: Added to the norm, as in torch.
EPSILON = 1e-6


class MeanClip(Part):
    """Clips the gradients of one model.

    Args:
        session: session of the worker.
        gradients: gradients of the model.
        joint: whether a step applies the mean of all workers' gradients; False clips each by its own norm.
    """

    def __init__(self, session: Session, gradients: Gradients, *, joint: bool) -> None:
        self._session, self._gradients, self._joint = session, gradients, joint
        self._warned = False
        self._notice = ClipNotice(gradients.parameters, session.name) if joint else None

    def check_loop(self, num_workers: int) -> None:
        """Tell a loop that clips without this, as ``ClipNotice`` finds it. Call it when ``step`` begins.

        Args:
            num_workers: number of workers in the mean of the last step.
        """
        if self._notice is not None:
            self._notice.check(num_workers)

    def close(self) -> None:
        """Stop looking at gradients."""
        if self._notice is not None:
            self._notice.close()
            self._notice = None

    def after_fork_in_child(self) -> None:
        self.close()

    def clip(
        self,
        max_norm: float,
        norm_type: float,
        *,
        weight: float,
        passes: int,
        error_if_nonfinite: bool,
        order: Iterable[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Clip ``.grad`` of all parameters in place, as ``ParameterServerOptimizer.clip_grad_norm_`` describes.

        Args:
            max_norm: largest norm of the mean gradient, >= 0.
            norm_type: type of the norm, > 0; inf for the largest absolute value.
            weight: weight of this worker's gradient in the mean.
            passes: backward passes of the push, >= 1; their mean is clipped.
            error_if_nonfinite: whether a norm that is not finite is an error.
            order: parameters in the order in which this worker's own norm takes them, which decides how it rounds.

        Returns:
            The norm of the mean gradient before clipping, shape (), fp32.
        """
        self.close()  # the loop knows
        found = self._measure(norm_type, weight) if self._joint else None
        if found is None or found.norm is None:
            norm = self.own_norm(norm_type, passes, order, error_if_nonfinite=error_if_nonfinite)
        else:
            norm = torch.tensor(found.norm, dtype=torch.float32, device=self._device)
            if not math.isfinite(found.norm):
                if error_if_nonfinite:
                    raise RuntimeError(
                        f"the norm of type {norm_type:g} of the mean gradient of {', '.join(found.contributors)} is "
                        "not finite; with error_if_nonfinite=False the step is left out instead"
                    )
                # So the step is left out on all workers, as it would be with one.
                self._gradients.scale(torch.tensor(math.nan))
                return norm
        if passes > 1:
            self._gradients.scale(torch.clamp(max_norm / (norm + EPSILON), max=1.0))
        else:
            torch.nn.utils.clip_grads_with_norm_(self._gradients.parameters, max_norm, norm)
        return norm

    def own_norm(
        self, norm_type: float, passes: int, order: Iterable[torch.Tensor] = (), *, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """The norm of this worker's own gradient, the mean of ``passes`` so far."""
        norm = torch.nn.utils.get_total_norm(self._gradients.so_far(order), norm_type, error_if_nonfinite)
        return norm / passes if passes > 1 else norm

    def _measure(self, norm_type: float, weight: float) -> MeanNorm | None:
        """Ask the servers; None: this worker has lost its place in the job, which its step will find, too."""
        if not norm_type > 0:
            raise ConfigError(f"norm_type of clip_grad_norm_ has to be > 0, as of a mean; got {norm_type}")
        session = self._session
        self._gradients.forget_dense()
        try:
            with torch.no_grad():
                found = session.measure(
                    self._gather_on(self._device), self._gradients.missing, weight=weight, power=float(norm_type)
                )
        except (UnknownWorker, StepConflict) as error:
            log.info("worker %s clips by the norm of its own gradient: %s", session.name, error)
            return None
        finally:
            self._gradients.forget_dense()
        if found.without and not self._warned:
            self._warned = True
            log.warning(
                "worker %s clips step %d by the norm of the mean of %s alone: %s pushed the step without a "
                "clip_grad_norm_ of the optimizer; call it on every worker in each step, or on none",
                session.name,
                session.next_step,
                " and ".join(found.contributors),
                " and ".join(found.without),
            )
        return found

    def _gather_on(self, device: torch.device) -> Callable[[Bucket, torch.Tensor], torch.Tensor]:
        """Function that writes the gradient of a bucket, which is on ``device``, into a tensor on the CPU."""
        gather = self._gradients.gather
        if device.type == "cpu":
            return gather
        return lambda bucket, into: into.copy_(gather(bucket, torch.empty_like(into, device=device)))

    @property
    def _device(self) -> torch.device:
        gradients = (each.grad for each in self._gradients.parameters if each.grad is not None)
        return next((gradient.device for gradient in gradients), torch.device("cpu"))
