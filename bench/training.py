"""Samples per second of training through a server, beside plain training: the same model, data and optimizer.

    python bench/training.py                       # the demo's GPT, worker and server pinned to one core each
    python bench/training.py --task digits --plane network
    python bench/training.py --overlap eager       # as the ready-made tasks train

The worker computes on core 0 and the server on core 1, so a core's worth of computing is what both runs have. They take
turns, ``--repeat`` times; the ratio is the median of the ratios within a repetition. Both must end with the same bits.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull

#: Cores of the worker and of the server.
WORKER, SERVER = "0", "1"
DEADLINE = 300.0


def train(task_name: str, servers: str, plane: str, overlap: str, warm: int, steps: int) -> dict[str, float | str]:
    """Train in this process; without ``servers`` as plain PyTorch does."""
    import torch

    import torch_ps
    from torch_ps.worker.tasks import load

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = load(task_name)
    model = task.model()
    optimizer = task.optimizer(model, task.default_lr)
    served = None
    if servers:
        served = torch_ps.ParameterServerOptimizer(optimizer, model, servers, name="w0", plane=plane, overlap=overlap)
    batches: Iterator[object] = task.batches(0, 1, task.default_batch_size, 0)
    begin = 0.0
    for step in range(warm + steps):
        if step == warm:
            begin = time.perf_counter()
        (served or optimizer).zero_grad()
        task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        (served or optimizer).step()
    seconds = time.perf_counter() - begin
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    if served is not None:
        served.close()
    return {"samples_per_second": steps * task.default_batch_size / seconds, "digest": digest.hexdigest()}


def pinned(core: str, *arguments: str) -> list[str]:
    return ["taskset", "-c", core, sys.executable, *arguments]


def run(arguments: "list[str]") -> dict[str, float | str]:
    done = subprocess.run(
        pinned(WORKER, __file__, "--child", *arguments), stdout=subprocess.PIPE, timeout=DEADLINE, check=False
    )
    if done.returncode:
        raise SystemExit("a run failed; its message is above")
    found: dict[str, float | str] = json.loads(done.stdout)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        task, servers, plane, overlap, *counts = sys.argv[2:]
        json.dump(train(task, servers, plane, overlap, *map(int, counts)), sys.stdout)
        return
    parser = pushpull.options(__doc__, repeat=5)
    parser.add_argument("--task", default="gpt")
    parser.add_argument("--plane", default="auto")
    parser.add_argument("--overlap", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("two cores are needed, one for the worker and one for the server")
    warm, steps, repeat = (1, 2, 1) if arguments.quick else (5, arguments.steps, arguments.repeat)
    runs = []
    for _ in range(repeat):
        plain = run([arguments.task, "", arguments.plane, "", str(warm), str(steps)])
        with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder:
            command = pinned(
                SERVER,
                "-m",
                "torch_ps.ps.server.cli",
                "--listen",
                "127.0.0.1:0",
                "--metrics",
                "off",
                "--log-level",
                "warning",
            )
            with pushpull.serving([command], folder) as (_, servers):
                through = run([arguments.task, servers, arguments.plane, arguments.overlap, str(warm), str(steps)])
        if plain["digest"] != through["digest"]:
            raise SystemExit("the server's parameters are not those of plain training")
        runs.append((float(plain["samples_per_second"]), float(through["samples_per_second"])))
        sys.stderr.write(f"plain {runs[-1][0]:.1f}, through the server {runs[-1][1]:.1f} samples/s\n")
    ratio = statistics.median(b / a for a, b in runs)
    plain_rate, through_rate = (statistics.median(rates) for rates in zip(*runs, strict=True))
    sys.stdout.write(
        f"{arguments.task}, plane {arguments.plane}, overlap {arguments.overlap}: plain {plain_rate:.1f}, "
        f"through the server {through_rate:.1f} samples/s, ratio {ratio:.3f}; same bits\n"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"runs": runs, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
