"""CPU time per bucket on both ends as a job grows: what a push costs must not depend on how much else there is.

    python bench/buckets.py                  # 10 to 4,000 buckets; 2 and 64 workers; 1 and 64 data sets

A server and its workers exchange buckets of 256 values, so that bookkeeping is most of the work. "server" is the CPU
time of the server's event loop (its main thread) for each bucket that one worker pushes and gets back; "worker" is that
of all threads of the workers' process. Rows of buckets and data sets have one worker in synchronous mode; rows of
workers are asynchronous, 10 buckets each. Rows of one kind should agree within 20 %, except that every step also wakes
both processes a few times, which few buckets share. Medians of ``--repeat`` runs.

Source: schedstat, https://docs.kernel.org/scheduler/sched-stats.html (first field: nanoseconds on the CPU).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull
from bench.pushpull import Case

if TYPE_CHECKING:
    import torch_ps

VALUES = 256
#: Buckets that a run pushes in all, after a tenth as many to warm up.
PUSHED, QUICK = 8_000, 400


@dataclass(frozen=True)
class Row:
    kind: str  # "buckets", "workers" or "data sets": what the row is about
    buckets: int
    workers: int = 1
    datasets: int = 0

    @property
    def name(self) -> str:
        count = {"buckets": self.buckets, "workers": self.workers, "data sets": self.datasets}[self.kind]
        return f"{count} {self.kind}"

    @property
    def mode(self) -> str:
        return "async" if self.kind == "workers" else "sync"

    def run(self, pushed: int) -> tuple[float, float]:
        """Microseconds per bucket on the server's event loop and in the workers' process."""
        import torch

        import torch_ps

        size = f"{4 * VALUES / (1 << 20):.10f}"
        command = pushpull.serve_command(
            Case(self.mode, "none", "small"), self.workers, "--listen", "127.0.0.1:0", "--bucket-size", size
        )
        values = {f"x{number}": torch.ones(VALUES) for number in range(self.buckets)}
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-"))
            pids, servers = stack.enter_context(pushpull.serving([command], folder))
            loop = Path(f"/proc/{pids[0]}/task/{pids[0]}/schedstat")
            clients = [stack.enter_context(torch_ps.Client(servers, name=f"w{n}")) for n in range(self.workers)]
            for client in clients:
                client.init(values, torch_ps.OptimizerSpec("SGD", lr=1e-3))
            readers = [Reader(clients[0], number) for number in range(self.datasets)]
            rounds = max(pushed // (self.buckets * self.workers), 2)
            for number in range(rounds + rounds // 10 + 1):
                if number == rounds // 10 + 1:
                    before = nanoseconds(loop), time.process_time_ns()
                for client in clients:
                    for reader in readers[:1]:
                        reader.begin()
                    client.push(values)
            after = nanoseconds(loop), time.process_time_ns()
        count = 1e3 * rounds * self.buckets * self.workers
        return (after[0] - before[0]) / count, (after[1] - before[1]) / count


class Reader:
    """A data set of which a worker has samples."""

    def __init__(self, client: "torch_ps.Client", number: int) -> None:
        from torch_ps.common.pb import parameter_server_pb2 as pb

        self._counts = client._session.sample_counts
        data = pb.DataSet(name=f"d{number}", size=1 << 30, seed=0)
        self._key = data.SerializeToString(deterministic=True)
        request = pb.DataRequest(data=data, batch=1 << 16, epochs=1, wait=True)
        reply = client._session.request_samples(request)
        samples = sum(each.stop - each.start for each in reply.range)
        self._counts.add_received(self._key, reply.number, samples)

    def begin(self) -> None:
        """Have the next push cover one more sample."""
        self._counts.start(self._key, 1)


ROWS = (
    *(Row("buckets", count) for count in (10, 100, 1000, 4000)),
    *(Row("workers", 10, workers=count) for count in (2, 64)),
    *(Row("data sets", 10, datasets=count) for count in (1, 64)),
)


def nanoseconds(schedstat: Path) -> int:
    """CPU time of one thread."""
    return int(schedstat.read_text().split()[0])


def text(found: dict[Row, list[tuple[float, float]]]) -> str:
    lines = [f"{'row':<16}{'server us':>10}{'worker us':>11}"]
    for row, runs in found.items():
        server, worker = (statistics.median(each) for each in zip(*runs, strict=True))
        lines.append(f"{row.name:<16}{server:>10.1f}{worker:>11.1f}")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = pushpull.options(__doc__, repeat=3)
    options = parser.parse_args(arguments)
    rows = {row.name: row for row in ROWS}
    found: dict[Row, list[tuple[float, float]]] = {rows[name]: [] for name in pushpull.pick(list(rows), options.only)}
    for _ in range(1 if options.quick else options.repeat):
        for row, runs in found.items():
            runs.append(row.run(QUICK if options.quick else PUSHED))
    sys.stdout.write(text(found))


if __name__ == "__main__":
    main()
