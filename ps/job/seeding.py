"""Who sends the first parameters of a job, of which model they are, and whether they are there.

lead:  worker that SeederChoice lets --choose--> seeder --Seed on every shard, the lead last--> initialised
       other workers wait in until_decided; when the seeder leaves before that, one of them becomes the seeder
"""

import logging
import math
from collections.abc import Callable

from torch_ps.common import schema
from torch_ps.common.errors import ModelMismatch
from torch_ps.common.schema import Model
from torch_ps.ps.core.roster import Member, Roster, SessionKey
from torch_ps.ps.core.seeder_choice import SeederChoice
from torch_ps.ps.job.conditions import Conditions

log = logging.getLogger("torch_ps.ps")


class Seeding:
    """State of the seeding of one shard. All methods run on the event loop.

    Args:
        conditions: Where workers wait.
        choice: Decides which of the waiting workers seeds.

    Attributes:
        initialised: The parameters of this shard are there.
        seeder: Worker that the lead has asked for the parameters; ("", 0) before that.
    """

    def __init__(self, conditions: Conditions, choice: SeederChoice) -> None:
        self._conditions, self._choice = conditions, choice
        self.initialised = False
        self.seeder: SessionKey = ("", 0)
        self._model: Model | None = None  # on the lead: of the worker that seeds or has seeded

    async def until_decided(self, worker: str, rank: int | None, model: Model, deadline: float) -> Model:
        """Lead: wait until the parameters are there or this worker is the one to send them.

        Args:
            worker: Name of the worker that waits.
            rank: Rank that it asks for; None for the order of names.
            model: Model of that worker.
            deadline: Time on ``time.monotonic()``.

        Returns:
            The job's own object where ``model`` equals it, so that many who wait hold one.

        Raises:
            ModelMismatch: The job trains another model.
            WaitTimeout: The seeder has not sent the parameters by then, or too few workers have come to choose it.
        """
        while True:
            if self._model is None and not await self._until_chosen(worker, rank, deadline):
                return model
            if self._model is not None:
                schema.check_same(self._model, model, worker)
                model = self._model if model == self._model else model
            if self.initialised:
                return model
            await self._conditions.until(
                lambda: self.initialised or self._model is None,
                deadline,
                f"worker {self.seeder[0]!r} has not sent the first parameters",
            )

    async def _until_chosen(self, worker: str, rank: int | None, deadline: float) -> bool:
        """Wait until a seeder has been chosen (True) or this worker is to be the one (False)."""
        self._choice.add(worker, rank)
        self._conditions.notify()
        if not self._choice.may_seed(rank):
            log.info("worker %s waits: %s", worker, self._choice.reason())
        try:
            await self._conditions.until(
                lambda: self._model is not None or self._choice.may_seed(rank), deadline, self._choice.reason
            )
        finally:
            self._choice.remove(worker, rank)
        return self._model is not None

    def repeats(self, worker: str, roster: Roster, digest: str, model: Model) -> bool:
        """Lead: whether this is the seeder, which joins again with the same secret as it was not answered.

        Raises:
            ModelMismatch: It brings another model now.
        """
        member = roster.member(worker)
        if self.initialised or member is None or member.key != self.seeder or member.digest != digest:
            return False
        check_seeded(member, model, "the lead")
        return True

    async def until_initialised(self) -> None:
        """Wait for the parameters, for as long as the caller lives."""
        await self._conditions.until(lambda: self.initialised, math.inf, "no parameters")

    def choose(self, life: SessionKey, model: Model) -> None:
        """Lead: have this worker send the parameters of ``model``."""
        self.seeder, self._model = life, model

    def begin(self) -> None:
        """The parameters of this shard are being replaced."""
        self.initialised = False

    def finish(self, model: Model | None = None) -> None:
        """The parameters are there; ``model`` is given where no worker has sent them."""
        if model is not None:
            self._model = model
        self.initialised = True
        self._conditions.notify()

    def drop_seeder(self, is_member: Callable[[str, int], bool]) -> str:
        """Let another worker seed if the seeder has left too early. Returns its name then, else ""."""
        if self._model is None or self.initialised or is_member(*self.seeder):
            return ""
        self._model = None
        return self.seeder[0]


def check_seeded(seeder: Member, model: Model, place: str) -> None:
    """Refuse a model of the seeder that is not the one with which it has joined, by the digest in the roster.

    All shards compare with the same digest, so they hold parameters of one model.

    Args:
        place: Server to which the seeder has sent ``model``, for the message.

    Raises:
        ModelMismatch: It is another model.
    """
    if schema.digest_of(model) != seeder.seeds:
        raise ModelMismatch(
            f"worker {seeder.name!r} sends {place} another model than the one with which it has joined; every shard "
            "has to get the same"
        )
