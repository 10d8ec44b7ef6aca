"""Time that communication adds to a training step: not hidden, hidden behind backward, hidden behind forward too.

    python bench/overlap.py                              # as in docs/benchmark-log.md; links need root and iproute2
    python bench/overlap.py --rates 0,300 --only eager

The small GPT of the demo, 1.4 M parameters in buckets of 256 KiB, batches of 8 x 64 bytes, AdamW, one compute thread in
each process. Rate 0 is loopback; other rates put each process on a node with a link of so many Mb/s in each direction
(``bench/network.py``). Gradients and parameters go over the network plane.

"compute" is forward and backward alone. "exposed" is the seconds of a step beyond those of "compute" in the same
repetition: what is sent, the server's step and what comes back, as far as it is not hidden. "M/B" is the least that the
bytes of one direction take on the link. Except with "eager", parameters come back after backward: no more than one
direction can be hidden, behind backward or behind the other, so a step is compared with compute + M/B. Every worker
trains on the same batches, so after its run the model has to have the bits of training without a server; that is
checked.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull, rounds
from bench.network import Network, NoNetwork, check, enter, network
from bench.pushpull import Case
from bench.rounds import Job, Work
from torch_ps.worker.optim.ahead_choice import TRIAL

PORT = 50051
BUCKET_MIB = 0.25
BATCH, BATCHES = 8, 4
ORDERS = ("off", "auto", "forward", "eager", "eager,forward")
WARM, ROUNDS = 3 + TRIAL, 30  # by then "auto" and "forward" have tried both ways and chosen one


@dataclass(frozen=True)
class Row:
    """``rate`` 0: no limit. ``overlap`` "": no communication."""

    rate: int
    overlap: str

    @property
    def name(self) -> str:
        link = f"{self.rate} Mb/s" if self.rate else "loopback"
        return f"{link} {self.overlap}" if self.overlap else "compute"

    def run(self, work: Work) -> dict[str, float]:
        with rounds.jobs(work) as job:
            if not self.overlap:
                return rounds.gather(job, self.name, compute, server=None)
            if self.rate:
                with network(work.workers + 1, self.rate) as nodes:
                    return self._served(job, work, nodes)
            return self._served(job, work, None)

    def _served(self, job: Job, work: Work, nodes: Network | None) -> dict[str, float]:
        address = f"{nodes.address(work.workers)}:{PORT}" if nodes else "127.0.0.1:0"
        options = ["--listen", address, "--bucket-size", str(BUCKET_MIB), *(["--insecure"] if nodes else [])]
        command = pushpull.serve_command(Case("sync", "none", ""), work.workers, *options)
        if nodes:
            command = nodes.command(work.workers, command)
        with pushpull.serving([command], job.folder) as (pids, servers):
            return rounds.gather(job, self.name, train, nodes, servers, self.overlap, server=pids[0])


class Training:
    """The same model, data and optimizer in every process."""

    def __init__(self) -> None:
        import torch

        from torch_ps.worker.tasks.gpt import GptTask

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.task = GptTask()
        self.model = self.task.model()
        batches = self.task.batches(0, 1, BATCH, 0)
        self.batches = [next(batches) for _ in range(BATCHES)]
        self.optimizer: torch.optim.Optimizer = self.task.optimizer(self.model, 1e-3)
        self.step = 0

    def parameters(self) -> "torch.Tensor":
        import torch

        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    def backward(self) -> None:
        import torch

        loss = self.task.loss(self.model, self.batches[self.step % BATCHES])
        torch.autograd.backward(loss)
        self.step += 1

    def round(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def compute(job: Job, rank: int) -> None:
    training = Training()

    def one_round() -> None:
        training.backward()
        training.optimizer.zero_grad()

    rounds.measure(job, rank, one_round, training.parameters, error=lambda: 0.0)


def train(job: Job, rank: int, nodes: Network | None, servers: str, overlap: str) -> None:
    if nodes is not None:
        enter(nodes.names[rank])
    import torch_ps

    training, alone = Training(), Training()
    options: dict[str, Any] = {"overlap": overlap, "plane": "network", "name": f"w{rank}"}
    with torch_ps.ParameterServerOptimizer(training.optimizer, training.model, servers, **options) as optimizer:
        training.optimizer = optimizer

        def error() -> float:
            """Largest difference from training alone; all bits are the same where it is 0."""
            for _ in range(training.step):
                alone.round()
            return (training.parameters() - alone.parameters()).abs().max().item()

        rounds.measure(
            job,
            rank,
            training.round,
            training.parameters,
            lambda: optimizer.pushed_bytes + optimizer.pulled_bytes,
            error,
        )


def table(found: dict[Row, list[dict[str, float]]], megabytes: float) -> list[dict[str, Any]]:
    alone = found[Row(0, "")]
    records = []
    for row, runs in found.items():
        exposed = [a["seconds_per_round"] - b["seconds_per_round"] for a, b in zip(runs, alone, strict=False)]
        record = {"row": row.name, "seconds_per_step": rounds.seconds(runs), "exposed": statistics.median(exposed)}
        record["least"] = megabytes * 8 / row.rate if row.rate else None
        records.append({**record, "runs": runs})
    return records


def text(records: list[dict[str, Any]]) -> str:
    lines = [f"{'row':<24}{'ms/step':>10}{'exposed ms':>12}{'M/B ms':>9}{'/(compute + M/B)':>18}"]
    compute = records[0]["seconds_per_step"]
    for record in records:
        step, least = record["seconds_per_step"], record["least"]
        ratio = f"{step / (compute + least):.2f}" if least else "-"
        link = f"{1e3 * least:.0f}" if least else "-"
        lines.append(f"{record['row']:<24}{1e3 * step:>10.1f}{1e3 * record['exposed']:>12.1f}{link:>9}{ratio:>18}")
    return "\n".join(lines) + "\n"


def rates(words: str) -> list[int]:
    return rounds.numbers(words, 0)


def main() -> None:
    parser = pushpull.options(__doc__)
    parser.add_argument("--rates", type=rates, default="0,1000,300", help="Mb/s of the links, 0: loopback")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    rows = {row.name: row for row in (Row(rate, overlap) for rate in arguments.rates for overlap in ORDERS)}
    found: dict[Row, list[dict[str, float]]] = {Row(0, ""): []}
    found |= {rows[name]: [] for name in pushpull.pick(list(rows), arguments.only)}
    warm, timed = rounds.QUICK if arguments.quick else (WARM, ROUNDS)
    try:
        if any(arguments.rates):
            check()
        for _ in range(1 if arguments.quick else arguments.repeat):
            for row, runs in found.items():
                runs.append(row.run(Work("sync", "", arguments.workers, warm, timed)))
                if runs[-1]["error"]:
                    raise SystemExit(f"{row.name}: the model is off by {runs[-1]['error']:.1e} from training alone")
                sys.stderr.write(f"{row.name}: {1e3 * runs[-1]['seconds_per_round']:.1f} ms/step\n")
    except NoNetwork as error:
        sys.stderr.write(f"links cannot be emulated here: {error}; --rates 0 needs none\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    records = table(found, 4e-6 * sum(tensor.numel() for tensor in Training().model.parameters()))
    sys.stdout.write(text(records))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"rows": records}, indent=1))


if __name__ == "__main__":
    main()
