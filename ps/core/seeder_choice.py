"""Seeder choice: whose parameters a job begins with.

Rules of this file
  1. Where pushes are averaged step by step, it is the worker of the lowest rank among the first quorum, as with DDP,
     whatever the order in which they come: rank 0 at once, any other rank when as many ranks wait as the quorum has.
  2. Where pushes are applied one by one no order repeats a run anyway, and the first worker that comes is chosen. So is
     one without a rank: nobody knows which names are still to come.
  3. A candidate that goes away is forgotten. The quorum counts ranks: two workers that ask for one rank count once.

    add(rank 2) --> waits;  add(rank 0) --> rank 0 seeds, rank 2 waits for its parameters

Source: ``torch.nn.parallel.DistributedDataParallel``, which broadcasts the module of rank 0.
"""

from __future__ import annotations

from torch_ps.ps.core.policy import name_list


class SeederChoice:
    """The lead's candidates, while nobody has been asked for the parameters.

    Args:
        quorum: number of workers that the first step waits for, >= 1.
        by_rank: whether the lowest rank of the quorum is chosen; False chooses whoever comes first.
    """

    def __init__(self, *, quorum: int, by_rank: bool) -> None:
        self._quorum, self._by_rank = quorum, by_rank
        self._waiting: list[tuple[int | None, str]] = []

    def add(self, worker: str, rank: int | None) -> None:
        """A worker is ready to seed. Each ``add`` ends with one ``remove``."""
        self._waiting.append((rank, worker))

    def remove(self, worker: str, rank: int | None) -> None:
        """A worker no longer waits to be chosen."""
        self._waiting.remove((rank, worker))

    def may_seed(self, rank: int | None) -> bool:
        """Whether a waiting worker with this rank may seed now."""
        if not self._by_rank or not rank:
            return True
        ranks = {rank for rank, _ in self._waiting if rank is not None}
        return len(ranks) >= self._quorum and rank == min(ranks)

    def reason(self) -> str:
        """Why nobody has been chosen, as the clause of a timeout."""
        here = tuple(worker for _, worker in sorted(self._waiting, key=lambda each: (each[0] or 0, each[1])))
        missing = self._quorum - len({rank for rank, _ in self._waiting})
        return (
            f"{missing} of {self._quorum} workers have not joined the job, which begins with the parameters of the "
            f"lowest rank of them; {name_list(here)} did"
        )
