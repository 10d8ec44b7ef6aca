"""Training on a GPU through a server, beside plain training in the same process: bits, samples/s, pinned memory.

    make gpu                       # the tests that need a GPU, then this; at most six minutes
    python bench/gpu.py            # this alone
    python bench/gpu.py --only "1 worker memory"

Bits: five steps of the demo's GPT in fp32 with deterministic kernels and one worker, and how far its parameters are
from those of plain training. The planes have to agree in every bit where the server is on the CPU.

Speed: a GPT of 99 million parameters in bf16 autocast, batches of 16 x 1024 bytes, fused AdamW, ``overlap="on"``. Each
worker first measures "compute", which is forward and backward alone, and "plain", which is a training step without a
server, then steps through the server; with two workers both do so at the same time on the same GPU. "exposed" is the
time of a step beyond that of "compute": what is sent, the server's step and what comes back, as far as it is not
hidden. "pinned" is the most pinned memory that torch held in one worker. The GPU has finished when a step is counted.
Workers have to end with the same parameters.

Where torch finds no GPU the CPU stands in for it, with the demo's GPT: it takes the same steps, so this program can be
tested, but its figures are of no GPU.
"""

import functools
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

    import torch_ps

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull, rounds
from bench.pushpull import Case
from bench.rounds import DEADLINE, Job, Work

#: Largest difference from plain training, as a share of the largest parameter: kernels may sum in another order.
CLOSE = 1e-3
COLUMNS = ("samples/s", "plain", "ratio", "ms/step", "exposed ms", "pinned MiB")
#: First argument that makes this program a server that takes the CPU for a GPU.
SERVE = "--serve"


@dataclass(frozen=True)
class Plan:
    """What is trained, and how many steps of it."""

    width: int  # of the model; 0: the demo's GPT
    batch: int
    warm: int
    rounds: int


BITS, FULL, SMALL, QUICK = Plan(0, 8, 1, 4), Plan(768, 16, 3, 8), Plan(0, 8, 2, 6), Plan(0, 1, 1, 1)


@dataclass(frozen=True)
class Row:
    workers: int
    plane: str
    server: str  # "cpu" or "gpu"

    @property
    def name(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} {self.plane} {self.server}"


ROWS = {row.name: row for row in (Row(n, p, s) for n in (1, 2) for p in ("memory", "network") for s in ("cpu", "gpu"))}


@dataclass(frozen=True)
class Report:
    """What one worker tells beside the times of its steps.

    Attributes:
        digest: digest of its parameters at the end.
        compute, plain: seconds of a step; 0 where they are not measured.
        pinned: largest number of bytes of pinned memory; 0 on the CPU.
    """

    digest: str
    compute: float = 0.0
    plain: float = 0.0
    pinned: int = 0


#: Figures of ``rounds.gather`` and the reports of the workers, or why there are none.
Outcome: TypeAlias = tuple[dict[str, float], list[Report]] | str


class Training:
    """The same model in every worker; batches of its own for each rank.

    Args:
        gpu: whether the model is on a GPU.
        plan: sizes.
        precision: fp32 or bf16.
    """

    def __init__(self, gpu: bool, plan: Plan, precision: str, rank: int = 0, workers: int = 1) -> None:
        import torch

        from torch_ps.worker.tasks.gpt import GptTask, Size
        from torch_ps.worker.training.precision import Precision

        torch.manual_seed(0)
        self._gpu = gpu
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        self._task = GptTask(size=Size(plan.width, 14, 12, 1024) if plan.width else None)
        self._precision = Precision(precision, device)
        self.model = self._task.model().to(device)
        drawn = self._task.batches(rank, workers, plan.batch, 0)
        self._batches = [next(drawn).to(device) for _ in range(4)]
        self._step = 0
        self.optimizer = self.plain_optimizer()

    def plain_optimizer(self) -> "torch.optim.Optimizer":
        return self._task.optimizer(self.model, 1e-4)

    def compute(self) -> None:
        self._backward()
        self.optimizer.zero_grad()
        self._finish()

    def round(self) -> None:
        self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._finish()

    def parameters(self) -> "torch.Tensor":
        """All of them, shape (n,), on the CPU."""
        import torch

        return torch.cat([parameter.detach().reshape(-1).cpu() for parameter in self.model.parameters()])

    def digest(self) -> str:
        return hashlib.sha256(self.parameters().numpy().tobytes()).hexdigest()

    def _backward(self) -> None:
        with self._precision.autocast():
            loss = self._task.loss(self.model, self._batches[self._step % len(self._batches)])
        self._precision.backward(loss)
        self._step += 1

    def _finish(self) -> None:
        if self._gpu:
            import torch

            torch.cuda.synchronize()


def serving(training: Training, rank: int, plane: str, servers: str, gpu: bool) -> "torch_ps.ParameterServerOptimizer":
    """The optimizer of one worker. Without a GPU its model is treated as if it were on one."""
    import torch

    import torch_ps
    from torch_ps.worker.optim import gpu_transfer, optimizer

    if not gpu:
        on_cpu = functools.partial(gpu_transfer.attach_transfer, device=torch.device("cpu"))
        optimizer.choose_pusher = on_cpu  # type: ignore[attr-defined]
    served = torch_ps.ParameterServerOptimizer(
        training.plain_optimizer(), training.model, servers, name=f"w{rank}", plane=plane, overlap="on"
    )
    if not isinstance(served._pusher, gpu_transfer.GpuTransfer):
        raise SystemExit("the optimizer does not treat the model as one on a GPU")
    return served


def bits(job: Job, rank: int, row: Row, servers: str, gpu: bool, plan: Plan) -> None:
    """A worker whose error is the largest difference from plain training, as a share of the largest parameter."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as torch asks for where kernels are to be deterministic
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        alone, training = Training(gpu, plan, "fp32"), Training(gpu, plan, "fp32")
        with serving(training, rank, row.plane, servers, gpu) as training.optimizer:

            def error() -> float:
                for _ in range(plan.warm + plan.rounds):
                    alone.round()
                expected = alone.parameters()
                return ((training.parameters() - expected).abs().max() / expected.abs().max()).item()

            rounds.measure(job, rank, training.round, training.parameters, error=error)
    job.publish(f"report{rank}", json.dumps(asdict(Report(training.digest()))))


def speed(job: Job, rank: int, row: Row, servers: str, gpu: bool, plan: Plan, together: Barrier) -> None:
    """A worker that measures computing, plain training and training through the server.

    Args:
        together: barrier of all workers, so that they compute at the same time.
    """
    import torch

    training = Training(gpu, plan, "bf16", rank, row.workers)
    compute = timed(training.compute, plan, together)
    plain = timed(training.round, plan, together)
    with serving(training, rank, row.plane, servers, gpu) as training.optimizer:
        rounds.measure(job, rank, training.round, training.parameters, error=lambda: 0.0)
        digest = training.digest()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"] if gpu else 0
    job.publish(f"report{rank}", json.dumps(asdict(Report(digest, compute, plain, pinned))))


def timed(one_round: Callable[[], None], plan: Plan, together: Barrier) -> float:
    """Median seconds of a round."""
    together.wait(DEADLINE)
    seconds = []
    for _ in range(plan.warm + plan.rounds):
        begin = time.perf_counter()
        one_round()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[plan.warm :])


def run(row: Row, gpu: bool, plan: Plan, target: Callable[..., None]) -> tuple[dict[str, float], list[Report]]:
    """Figures of ``rounds.gather`` and the reports of the workers, all on one server.

    Raises:
        SystemExit: a process failed; its own message is on stderr.
    """
    command = pushpull.serve_command(Case("sync", "none", ""), row.workers, "--listen", "127.0.0.1:0")
    if row.server == "gpu":
        command = [*command, "--device", "cuda"] if gpu else [sys.executable, __file__, SERVE, *command[3:]]
    work = Work("sync", "", row.workers, plan.warm, plan.rounds)
    with rounds.jobs(work) as job, pushpull.serving([command], job.folder) as (pids, servers):
        more = (rounds.context.Barrier(row.workers),) if target is speed else ()
        figures = rounds.gather(job, row.name, target, row, servers, gpu, plan, *more, server=pids[0])
        return figures, [Report(**json.loads(job.published(f"report{rank}"))) for rank in range(row.workers)]


def attempt(row: Row, gpu: bool, plan: Plan, target: Callable[..., None]) -> Outcome:
    """``run``, where a failure of one row keeps no other from running: time on a machine with a GPU is scarce."""
    try:
        return run(row, gpu, plan, target)
    except SystemExit as error:
        return str(error)


def compare_bits(rows: Sequence[Row], gpu: bool) -> list[str]:
    """Print how far each row is from plain training; what is wrong. The rows run at once, since nothing is timed."""
    with ThreadPoolExecutor(len(rows)) as pool:
        found = list(pool.map(lambda row: attempt(row, gpu, BITS, bits), rows))
    sys.stdout.write("bits, against plain training\n")
    wrong, on_cpu = [], set()
    for row, outcome in zip(rows, found, strict=True):
        if isinstance(outcome, str):
            sys.stdout.write(f"{row.name:<24}failed\n")
            wrong.append(outcome)
            continue
        figures, (report,) = outcome
        error = figures["error"]
        sys.stdout.write(f"{row.name:<24}{f'off by {error:.1e}' if error else 'the bits of plain training'}\n")
        if not error < CLOSE:
            wrong.append(f"{row.name}: parameters are off by {error:.1e} of the largest one")
        if row.server == "cpu":
            on_cpu.add(report.digest)
    if len(on_cpu) > 1:
        wrong.append("the planes give different bits with a server on the CPU")
    return wrong


def measure_speed(rows: Sequence[Row], gpu: bool, plan: Plan, end: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Print a table row by row; its records, and what is wrong.

    Args:
        end: time on the monotonic clock after which no row begins.
    """
    model = "GPT of 99 M parameters" if plan.width else "GPT of the demo, 1.4 M parameters"
    sys.stdout.write(f"\nspeed, {model}\n{'':<24}" + "".join(f"{head:>12}" for head in COLUMNS) + "\n")
    records, wrong = [], []
    for row in rows:
        sys.stdout.write(f"{row.name:<24}")
        sys.stdout.flush()
        if time.monotonic() > end:
            sys.stdout.write("not measured: no time is left\n")
            continue
        outcome = attempt(row, gpu, plan, speed)
        if isinstance(outcome, str):
            sys.stdout.write("failed\n")
            wrong.append(outcome)
            continue
        figures, reports = outcome
        step = figures["seconds_per_round"]
        compute, plain = (max(getattr(report, name) for report in reports) for name in ("compute", "plain"))
        samples, pinned = row.workers * plan.batch, max(report.pinned for report in reports)
        values = (samples / step, samples / plain, plain / step, 1e3 * step, 1e3 * (step - compute), pinned / 2**20)
        sys.stdout.write("".join(f"{value:>12.{2 if value < 10 else 1}f}" for value in values) + "\n")
        records.append({"row": row.name, **figures, "workers": [asdict(report) for report in reports]})
        if len({report.digest for report in reports}) > 1:
            wrong.append(f"{row.name}: the workers end with different parameters")
    return records, wrong


def main() -> None:
    if sys.argv[1:2] == [SERVE]:
        from tests.support.gpu import serve

        return serve(sys.argv[2:])
    parser = pushpull.options(__doc__, repeat=1)
    parser.add_argument("--seconds", type=float, default=180.0, help="no row begins after so many; default 180")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    import torch

    gpu = torch.cuda.is_available()
    rows = [ROWS[name] for name in pushpull.pick(list(ROWS), arguments.only)]
    place = torch.cuda.get_device_name(0) if gpu else "no GPU: the CPU stands in for it, and no figure is of a GPU"
    sys.stdout.write(
        f"{place}; torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores\n\n"
    )
    alone = [row for row in rows if row.workers == 1]
    wrong = compare_bits(alone, gpu) if alone else []
    plan = QUICK if arguments.quick else FULL if gpu else SMALL
    records, more = measure_speed(rows * arguments.repeat, gpu, plan, end)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"gpu": gpu, "place": place, "rows": records}, indent=1))
    if wrong + more:
        raise SystemExit("\n".join(wrong + more))


if __name__ == "__main__":
    main()
