"""Whether a script that has ended has taken part in its job: one that makes no optimizer of torch-ps trains alone.

A script that has named servers in this process has. Another one may have started processes that have, so the leads are
asked whether anybody has ever joined.
"""

import contextlib
import sys

from torch_ps.common.errors import PsError
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.common.wire.job_servers import parse_jobs

#: Seconds in which a lead has to answer.
ANSWER_SECONDS = 10.0


def check_joined(worker: WorkerConfig) -> None:
    """Check that somebody has joined a job of ``worker.servers`` since the servers were started.

    Raises:
        PsError: nobody has; says what the script lacks.
    """
    used = sys.modules.get("torch_ps.worker.runtime.access")  # not imported before the script has run
    if not worker.servers or (used is not None and used.servers_named):
        return
    from torch_ps.worker.runtime.access import access_in
    from torch_ps.worker.transport.link import Link

    for job in parse_jobs(worker.servers):
        with contextlib.closing(Link(job.shards[0][0], access_in(worker))) as link:
            try:
                if link.status(ANSWER_SECONDS).joins:
                    return
            except PsError:
                return  # the servers have ended, so nobody knows
    raise PsError(
        "the script has ended and no worker has ever joined the job, so it has trained alone: wrap its optimizer in "
        "torch_ps.ParameterServerOptimizer"
    )
