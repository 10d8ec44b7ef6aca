"""Compares --trace with a stop-watch in the training loop, and measures the cost of tracing.

    python bench/trace.py                 # two workers of ps-run, a small and a large model, every step traced

The loop of each worker reads a clock after every ``optimizer.step()``. Shown are the mean step by that clock, the mean
of the parts of the same steps in the trace, and by how much they differ; then the median step of a job that is traced
as a share of one that is not, the two in turn, the best of ``--repeat`` each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

WORKERS = 2
#: Layers of the model, batch size, steps before those that count, and steps that do.
SIZES = {"small": ((64, 64, 10), 32, 20, 200), "big": ((1024, 2048, 2048, 1024, 10), 32, 5, 20)}


def loop(size: str, folder: str, steps: int) -> None:
    """A worker: trains, and writes when each step ended."""
    import torch
    from torch import nn

    import torch_ps

    layers, batch, _, _ = SIZES[size]
    torch.manual_seed(0)
    model = nn.Sequential(
        *[part for widths in pairwise(layers) for part in (nn.Linear(*widths), nn.ReLU())][:-1],
    )
    inputs, labels = torch.randn(batch, layers[0]), torch.randint(10, (batch,))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch_ps.ParameterServerOptimizer(inner, model) as optimizer:
        assert optimizer.world == WORKERS  # noqa: S101
        ends = []
        for _ in range(steps):
            nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.monotonic())
        Path(folder, optimizer.name).write_text(json.dumps(ends), encoding="utf-8")


def run(size: str, warm: int, steps: int, *, traced: bool) -> tuple[list[float], list[float]]:
    """Seconds of the steps of all workers by the clock of their loops, and by the trace."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        options = [f"--trace={trace}", f"--trace-steps={warm}:{warm + steps}"] if traced else []
        script = [str(Path(__file__)), "--worker", size, folder, str(warm + steps)]
        command = [sys.executable, "-m", "torch_ps.worker.commands.run", "-n", str(WORKERS), *options, *script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        measured = []
        for rank in range(WORKERS):
            ends = json.loads(Path(folder, f"w{rank}").read_text(encoding="utf-8"))[warm - 1 :]
            measured += [after - before for before, after in pairwise(ends)]
        return measured, of_trace(trace) if traced else []


def of_trace(path: Path) -> list[float]:
    """Seconds of each step of each worker: the sum of its parts."""
    from torch_ps.ps.observability.perfetto import PARTS

    found: dict[tuple[int, int], float] = {}
    for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        if event["ph"] == "X" and event["name"] in PARTS:
            key = event["pid"], event["args"]["step"]
            found[key] = found.get(key, 0.0) + event["dur"] / 1e6
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps of the small model, to see that it works")
    parser.add_argument("--worker", nargs=3, metavar=("SIZE", "FOLDER", "STEPS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        size, folder, steps = given.worker
        return loop(size, folder, int(steps))
    for size, (_, _, warm, steps) in list(SIZES.items())[: 1 if given.quick else None]:
        if given.quick:
            warm, steps = 1, 3
        medians: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(1 if given.quick else given.repeat):
            for traced in (True, False):
                measured, told = run(size, warm, steps, traced=traced)
                medians[traced].append(statistics.median(measured))
                if traced:
                    mean, parts = statistics.mean(measured), statistics.mean(told)
                    sys.stdout.write(
                        f"{size}: {len(measured)} steps, {1e3 * mean:.3f} ms by the loop, {1e3 * parts:.3f} ms by the "
                        f"trace: {parts / mean - 1:+.2%}\n"
                    )
        share = min(medians[True]) / min(medians[False])
        sys.stdout.write(f"{size}: a traced step takes {share:.3f} times as long as one that is not\n")


if __name__ == "__main__":
    main()
