"""What a training loop can ask about the job, its last step, and what has passed so far.

    Shown       what a client knows too: the job, who takes part, bytes
    +-- Facts   what an optimizer knows of its steps

Rules of this file
  1. Answers only; nothing changes. What is said of a step is said when that step is complete: see ``_last``.
"""

from collections.abc import Callable

from torch_ps.common.errors import PsError
from torch_ps.worker.gradients.gradients import Gradients, NoGradients
from torch_ps.worker.gradients.local_steps import LocalSteps
from torch_ps.worker.runtime import graceful_shutdown
from torch_ps.worker.session.session import Session, StepOutcome


class Shown:
    """The questions that a client and an optimizer answer alike; their attributes are these."""

    name: str
    _session: Session

    @property
    def mode(self) -> str:
        return self._session.job.mode

    @property
    def pushed_bytes(self) -> int:
        """Encoded gradients sent so far."""
        return self._session.pushed_bytes

    @property
    def pulled_bytes(self) -> int:
        """Encoded parameters received so far."""
        return self._session.pulled_bytes

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers in rank order; waits for the first quorum, at most ``timeout`` seconds."""
        return tuple(member.worker for member in self._session.roster().member)

    @property
    def rank(self) -> int:
        """This worker's place among ``workers``."""
        return self.workers.index(self.name)


class Facts(Shown):
    """The questions that ``ParameterServerOptimizer`` answers; its attributes are these."""

    _outcome: StepOutcome
    _local: LocalSteps | None
    _source: Gradients | LocalSteps | NoGradients
    wait: Callable[[], None]
    close: Callable[[], None]

    @property
    def _last(self) -> StepOutcome:
        """What the last step came to; waits for it where it is still under way."""
        self.wait()
        return self._outcome

    @property
    def version(self) -> int:
        """Optimizer steps that the parameters in the model have had."""
        return self._last.version

    @property
    def staleness(self) -> int:
        """Of the last push: optimizer steps between the parameters it was computed from and those it was applied to."""
        return self._last.staleness

    @property
    def samples(self) -> float:
        """Sum of the weights that the whole job has absorbed, as of the last step."""
        return self._last.samples

    @property
    def unpushed(self) -> float:
        """Sum of the weights of this worker's local steps since its last push; 0 without local steps."""
        return self._local.applied if self._local is not None else 0.0

    @property
    def left_out(self) -> int:
        """Steps of this worker that were not applied because a gradient was not finite; inner ones with local steps."""
        return self._source.num_left_out

    @property
    def left_out_in_a_row(self) -> int:
        """How many of them there have been since the last push that was to be applied."""
        return self._source.in_a_row

    @property
    def wait_seconds(self) -> float:
        """Seconds that ``step`` has waited for answers so far."""
        return self._session.wait_seconds

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers in rank order; waits for the first quorum, at most ``timeout`` seconds."""
        try:
            return super().workers
        except PsError:
            graceful_shutdown.exit_if_requested(self.name, self.close)
            raise

    @property
    def world(self) -> int:
        """Number of ``workers``."""
        return len(self.workers)
