"""Cost of checkpoints for a job: one worker, one shard, AdamW on 25 M parameters (100 MB), on one machine.

    python bench/checkpoint.py

Seconds per step without checkpoints and with one after the other, as fast as they can be written; how long a bucket's
lane was held up to copy it (all that training waits for, though writing takes its part of the processors); and how long
one checkpoint took to write, with its size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import torch_ps
from bench.model import Model

START_SECONDS = 60.0
WRITE = "ps_checkpoint_write_seconds"


@dataclass(frozen=True)
class Cost:
    """Seconds are per step, per copied bucket and per checkpoint."""

    step: float
    copy: float
    write: float
    num_written: int
    size: int


def metrics(address: str) -> dict[str, float]:
    """Metrics of the server, by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.partition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}


def measure(folder: Path, steps: int, size: str, options: list[str]) -> Cost:
    ready = folder / "ready"
    command = [
        sys.executable,
        "-m",
        "torch_ps.ps.server.cli",
        "--listen",
        "127.0.0.1:0",
        "--ready-file",
        str(ready),
        *options,
    ]
    server = subprocess.Popen([*command, "--log-level", "warning"])
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("ps-serve has not started; its own lines say why")
            time.sleep(0.05)
        told = json.loads(ready.read_text())
        model = Model(size)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        with torch_ps.ParameterServerOptimizer(inner, model, told["servers"][0], name="w0") as optimizer:
            spent = []
            for _ in range(steps):
                begin = time.perf_counter()
                optimizer.step()
                spent.append(time.perf_counter() - begin)
        found = metrics(told["metrics"][0])
        while options and not found[f"{WRITE}_count"] and time.monotonic() < deadline:  # a few small steps are quicker
            time.sleep(0.05)
            found = metrics(told["metrics"][0])
    finally:
        server.terminate()
        server.wait(START_SECONDS)

    def mean(name: str) -> float:
        return found[f"{name}_sum"] / max(found[f"{name}_count"], 1)

    files = [path.stat().st_size for path in folder.glob("kept/v*/*.safetensors")]
    return Cost(
        statistics.median(spent[1:]),
        mean("ps_checkpoint_copy_seconds"),
        mean(WRITE),
        int(found[f"{WRITE}_count"]),
        max(files, default=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="the small model and few steps, to see that it works")
    arguments = parser.parse_args()
    steps, size = (8, "small") if arguments.quick else (arguments.steps, "big")
    out = sys.stdout.write
    out(f"{'':<20}{'ms a step':>10}{'ms to copy a bucket':>21}{'s to write':>12}{'written':>9}{'MB':>8}\n")
    for name in ("no checkpoints", "one after the other"):
        with tempfile.TemporaryDirectory(prefix="torch-ps-bench-") as text:
            folder = Path(text)
            kept = ["--checkpoint", str(folder / "kept"), "--checkpoint-every", "1"] if name[:2] != "no" else []
            cost = measure(folder, steps, size, kept)
        out(
            f"{name:<20}{1e3 * cost.step:>10.1f}{1e3 * cost.copy:>21.2f}{cost.write:>12.2f}{cost.num_written:>9}"
            f"{cost.size / 1e6:>8.1f}\n"
        )


if __name__ == "__main__":
    main()
