"""Who is being waited for and since when, in the same words in the error of a wait and in ``ps-status``.

    step 7 waits for w1, for 4.9 s; w1 is silent for 5.2 s

The servers say what they hold back and the lead who is silent; nothing here decides or waits for anything.
"""

from collections.abc import Iterable, Sequence

from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.transport.link import Link

#: Silence that is worth a word: a worker that is there renews its lease three times in it.
SILENT = 1.0
#: Seconds in which a server has to say what it waits for.
ASK_SECONDS = 5.0


def describe_wait(worker: str, replies: Sequence[pb.StatusReply]) -> str:
    """What ``worker`` waits for longest, as the shards of the job see it (shard 0 first); "" where it does not wait."""
    views = [view for reply in replies for view in reply.worker if view.worker == worker]
    longest = max(views, key=lambda view: view.waiting_seconds, default=pb.WorkerStatus())
    if not longest.waiting_seconds:
        return ""
    silent = {w.worker: w.silent_seconds for w in replies[0].worker if w.silent_seconds > SILENT}
    words = [f"{longest.reason}, for {format_seconds(longest.waiting_seconds)}"]
    words += [f"{who} is silent for {format_seconds(silent[who])}" for who in longest.waiting_for if who in silent]
    return "; ".join(words)


def explain_wait(worker: str, links: Iterable[Link]) -> str:
    """Ask all shards why ``worker`` has no answer; never raises."""
    replies = []
    for link in links:
        try:
            replies.append(link.status(ASK_SECONDS))
        except PsError as error:
            return str(error)
    if all(view.worker != worker for view in replies[0].worker):
        return f"{worker} is not in the roster any more"
    return describe_wait(worker, replies) or "no server holds an answer back, so it or the push is still on its way"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
