"""Memory of one server with 25 M parameters (95.4 MiB of fp32), SGD with momentum, for 2 and for 8 workers.

    python bench/memory.py

The third column is what the server must hold in copies of the parameters: itself and the momentum, and what the mode or
the codec of pulls keeps for each worker; gradients in shared memory count here, though they are the workers' own. The
rest of the peak above the start are messages on their way: gradients that wait for their step, answers not sent yet.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rounds
from bench.pushpull import Case, run

#: Parameters of the two models.
NUMEL = {"big": 24_999_936, "small": 10_000}
#: What a case is called, the case, and the copies that it keeps per worker and for the whole shard beside the two.
CASES = (
    ("sync", Case("sync", "none", "big"), 0, 0),
    ("sync, shared memory", Case("sync", "none", "big", plane="memory"), 1, 0),
    ("sync, fp16 both ways", Case("sync", "fp16", "big"), 0, 0),
    ("sync, int8 both ways", Case("sync", "int8", "big"), 1, 0),
    ("async", Case("async", "none", "big"), 0, 0),
    (
        "async, constant delay compensation",
        Case("async", "none", "big", server=("--delay-compensation", "constant")),
        1,
        0,
    ),
    (
        "async, adaptive delay compensation",
        Case("async", "none", "big", server=("--delay-compensation", "adaptive")),
        1,
        1,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2,8", help="numbers of workers, comma-separated")
    parser.add_argument("--only", default="", help="how the names of the cases to run begin")
    parser.add_argument("--quick", action="store_true", help="one case of the small model, to see that it works")
    arguments = parser.parse_args()
    counts = [int(text) for text in arguments.workers.split(",")]
    cases = [("quick", Case("sync", "none", "small"), 0, 0)] if arguments.quick else list(CASES)
    out = sys.stdout.write
    out(f"{'case':<36}{'workers':>8}{'held MiB':>10}{'start MiB':>11}{'peak MiB':>10}{'peak - start - held':>21}\n")
    for name, case, per_worker, once in [each for each in cases if each[0].startswith(arguments.only)]:
        copy = NUMEL[case.size] * 4 / 2**20
        for workers in counts:
            work = rounds.work(case.mode, case.size, workers, quick=arguments.quick)
            found = run(case, workers, work)
            held = copy * (2 + once + per_worker * workers)
            start, peak = found["server_mib_at_start"], found["server_mib_at_peak"]
            out(f"{name:<36}{workers:>8}{held:>10.0f}{start:>11.0f}{peak:>10.0f}{peak - start - held:>21.0f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
