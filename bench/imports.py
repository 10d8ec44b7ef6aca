"""Import time: seconds of ``import torch`` and of ``import torch_ps`` on top, each in a fresh interpreter.

python bench/imports.py [--rounds 10]
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What is imported, one after the other in one interpreter.
STEPS = {
    "torch": "import torch",
    "+ torch_ps": "import torch_ps",
    "+ its optimizer": "torch_ps.ParameterServerOptimizer",  # which loads what it needs, gRPC too
}
PROGRAM = """
import time
marks = [time.monotonic()]
{}
print(*(after - before for before, after in zip(marks, marks[1:])))
""".format("\n".join(f"{step}\nmarks.append(time.monotonic())" for step in STEPS.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it works")
    arguments = parser.parse_args()
    found: list[list[float]] = []
    for _ in range(1 if arguments.quick else arguments.rounds):
        done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
        found.append([float(each) for each in done.stdout.split()])
    for name, times in zip(STEPS, zip(*found, strict=True), strict=True):
        sys.stdout.write(f"{name:<16}{statistics.median(times):8.4f} s  ({min(times):.4f} to {max(times):.4f})\n")


if __name__ == "__main__":
    main()
