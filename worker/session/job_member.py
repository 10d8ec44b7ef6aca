"""What a client and a wrapped optimizer tell alike about their job: mode, members, bytes."""

from typing import NoReturn

from torch_ps.common.errors import PsError
from torch_ps.worker.runtime.lifetime import Lifetime
from torch_ps.worker.session.session import Session


class JobMember:
    """A member of a job.

    Args:
        session: session of the member.

    Attributes:
        name: name of the worker, unique in the job.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.name = session.name
        self._lifetime = Lifetime(self, session.name, session)

    def __getstate__(self) -> NoReturn:
        raise PsError(
            f"worker {self.name!r} takes part in a job, so it cannot be copied or pickled: save or copy the model and "
            "state_dict(), and let a process that is to be a worker make an optimizer or client of its own"
        )

    @property
    def mode(self) -> str:
        """Mode of the job: "sync", "async" or "ssp"."""
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
