"""After the servers have gone back to a checkpoint: a worker that lives on pulls what they have and goes on from there.

    push of step 12 --> StepConflict: step 8 is open --> pull --> parameters of version 8, next step 8

The gradient that could not be applied is gone with the steps that were: they are trained again.
"""

import logging

from torch_ps.common.errors import StepConflict
from torch_ps.worker.session import Outcome, Session

log = logging.getLogger("torch_ps.worker")


def recovered(session: Session, conflict: StepConflict) -> Outcome:
    """Pull everything; what the job has now, as the outcome of a push that was not applied.

    Raises:
        StepConflict: ``conflict``, if the servers have not gone back, so a step was pushed that never was to be.
        WaitTimeout: says who is waited for.
    """
    before = session.version
    for _ in session.plan.shards():  # each of them may have its own conflict to tell
        for bucket in session.plan.buckets:
            session.pull(bucket)
        try:
            outcome = session.wait()
        except StepConflict:
            continue
        break
    log.warning("...")
    return outcome
