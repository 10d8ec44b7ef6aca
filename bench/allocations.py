"""Fresh memory that a server with 25 M parameters and a worker take for each push, in the steady state.

    python bench/allocations.py

Counted are minor page faults: pages that the system gives it, of 4 KiB where it gives no larger ones, so
"MiB a push" is the least that was new; "payload" is what one push carries. Memory that is used again, by the allocators
of C, of torch or of gRPC, costs none. So zero says that nothing of the size of a payload is taken from the system and
given back for each push, not that no allocator is called.
"""

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull, rounds
from bench.memory import NUMEL
from bench.pushpull import Case

CASES = (
    Case("sync", "none", "big", plane="memory"),
    Case("async", "none", "big", plane="memory"),
    Case("sync", "none", "big"),
    Case("async", "none", "big"),
    Case("sync", "fp16", "big"),
)
PAGE = 4096 / 2**20  # MiB


def main() -> None:
    parser = pushpull.options(__doc__, repeat=1)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    named = {case.name: case for case in CASES}
    cases = [named[name] for name in pushpull.pick(list(named), arguments.only)]
    if arguments.quick:
        cases = [replace(case, size="small") for case in cases]
    out = sys.stdout.write
    out(f"{'case':<24}{'faults a push':>15}{'MiB a push':>12}{'worker MiB':>12}{'payload MiB':>13}\n")
    for case in cases:
        work = rounds.work(case.mode, case.size, arguments.workers, quick=arguments.quick)
        found = pushpull.run(case, arguments.workers, work)
        # A round of sync is a push of every worker; rounds of async are counted one push each.
        pushes = 1 if case.mode == "async" else arguments.workers
        faults = found["server_faults_per_round"] / pushes
        payload = NUMEL[case.size] * (2 if case.codec == "fp16" else 4) / 2**20
        of_worker = found["worker_faults_per_push"] * PAGE
        out(f"{case.name:<24}{faults:>15.1f}{faults * PAGE:>12.3f}{of_worker:>12.3f}{payload:>13.1f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
