"""CPU of an idle job: a server and two connected workers that wait, in percent of a core.

python bench/idle.py [--seconds 20]
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull
from bench.pushpull import Case

#: Seconds in which what joining has begun comes to rest.
SETTLE = 3.0


def processor_seconds(stat: Path) -> float:
    """User and system time of one process. Source: proc(5)."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    import torch

    import torch_ps

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--quick", action="store_true", help="half a second, to see that it works")
    arguments = parser.parse_args()
    seconds = 0.5 if arguments.quick else arguments.seconds
    command = pushpull.serve_command(Case("async", "none", "small"), 2, "--listen", "127.0.0.1:0")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-"))
        pids, servers = stack.enter_context(pushpull.serving([command], folder))
        for rank in range(2):
            model = torch.nn.Linear(100, 100)
            optimizer = torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), model, servers, name=f"w{rank}"
            )
            stack.enter_context(optimizer).step()
        time.sleep(0.0 if arguments.quick else SETTLE)
        stats = {"server": Path(f"/proc/{pids[0]}/stat"), "two workers": Path("/proc/self/stat")}
        before, begin = {name: processor_seconds(stat) for name, stat in stats.items()}, time.monotonic()
        time.sleep(seconds)
        for name, stat in stats.items():
            share = (processor_seconds(stat) - before[name]) / (time.monotonic() - begin)
            sys.stdout.write(f"{name:<12}{share:8.2%} of a core\n")


if __name__ == "__main__":
    main()
