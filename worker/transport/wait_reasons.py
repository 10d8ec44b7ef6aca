"""Whom a worker waits for and since when, in the same words in the error of a wait and in ``ps-status``.

    step 7 waits for w1, for 4.9 s; w1 is silent for 5.2 s

The servers report what they hold back and the lead reports who is silent; this file puts it into a sentence.
"""

from collections.abc import Iterable, Sequence

from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.transport.link import Link

#: Seconds of silence from which on it is mentioned; a live worker renews its lease three times in it.
SILENT = 1.0
#: Seconds in which a server has to answer what it waits for.
STATUS_SECONDS = 5.0


def describe_wait(worker: str, replies: Sequence[pb.StatusReply]) -> str:
    """The longest wait of a worker as a sentence; "" if it does not wait.

    Args:
        worker: name.
        replies: status of all shards, shard 0 first.
    """
    views = [(view, reply) for reply in replies for view in reply.worker if view.worker == worker]
    none = pb.WorkerStatus(), pb.StatusReply()
    longest, reply = max(views, key=lambda each: each[0].waiting_seconds, default=none)
    if not longest.waiting_seconds:
        return ""
    silent = {w.worker: w.silent_seconds for w in replies[0].worker if w.silent_seconds > SILENT}
    words = [f"{longest.reason}, for {format_seconds(longest.waiting_seconds)}"]
    words += [
        f"{who} is silent for {format_seconds(silent[who])}" for who in waited_for(longest, reply) if who in silent
    ]
    return "; ".join(words)


def waited_for(worker: pb.WorkerStatus, reply: pb.StatusReply) -> tuple[str, ...]:
    """Names of the workers that a worker waits for, as far as the reply has room for them.

    Args:
        worker: status of the worker in ``reply``.
    """
    names = {each.rank: each.worker for each in reply.worker} if worker.waiting_for else {}
    return tuple(names[rank] for rank in worker.waiting_for if rank in names)


def explain_wait(worker: str, links: Iterable[Link]) -> str:
    """Ask all shards, shard 0 first, why ``worker`` gets no answer. Never raises: an error becomes the explanation."""
    replies = []
    for link in links:
        try:
            replies.append(link.status(STATUS_SECONDS))
        except PsError as error:
            return str(error)
    if not replies[0].more_workers and all(view.worker != worker for view in replies[0].worker):
        return f"{worker} is not in the roster any more"
    return describe_wait(worker, replies) or "no server holds an answer back, so it or the push is still on its way"


def advise_timeout(seconds: float) -> str:
    """The end of an error of a wait of ``seconds``, the longest: what to do where the wait was right."""
    return f"; if a worker evaluates or saves for longer than {seconds:g} s, raise --timeout (timeout=SECONDS)"


def format_seconds(seconds: float) -> str:
    """A duration for people: seconds below two minutes, else minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
