"""Workers on f(x) = lambda x^2 / 2: the gradient is lambda times the copy that was pulled, so everything is known.

Several lambdas stand side by side as elements of one tensor: SGD treats each alone, and one job answers for all.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

import torch_ps
from tests.support.jobs import Servers


class Quadratic:
    """One worker: its client, its copy of x and the version of that copy."""

    def __init__(self, client: torch_ps.Client, curvature: torch.Tensor) -> None:
        self.client, self.curvature = client, curvature
        snapshot = client.pull()
        self.x, self.version = snapshot.params["x"], snapshot.version
        self.staleness: list[int] = []

    def push(self) -> torch.Tensor:
        """Push the gradient at the own copy, take the fresh one; returns it."""
        result = self.client.push({"x": self.curvature * self.x}, base=self.version)
        self.x, self.version = result.params["x"], result.version
        self.staleness.append(result.staleness)
        return self.x


@contextlib.contextmanager
def quadratics(
    servers: Servers, num_workers: int, curvature: Sequence[float], *, lr: float = 1.0
) -> Iterator[list[Quadratic]]:
    """Workers w0, w1, ... that all start from x = 1 under plain SGD."""
    with contextlib.ExitStack() as stack:
        values = torch.tensor(curvature)
        workers = []
        for index in range(num_workers):
            client = stack.enter_context(torch_ps.Client(str(servers), name=f"w{index}"))
            client.init({"x": torch.ones(len(values))}, torch_ps.OptimizerSpec("SGD", lr=lr))
            workers.append(client)
        yield [Quadratic(client, values) for client in workers]


def round_robin(workers: Sequence[Quadratic], steps: int) -> torch.Tensor:
    """Each worker pushes and pulls in its turn.

    Returns:
        x after 0, 1, ..., ``steps`` pushes; shape (steps + 1, number of lambdas).
    """
    return torch.stack([workers[0].x] + [workers[step % len(workers)].push() for step in range(steps)])
