"""The golden results: a small comparison of synthetic jobs, kept as results.json beside this file.

``python -m tests.compare.golden`` writes the file again after the format or the figures were changed on purpose.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from tests.compare.synthetic import Job, write
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare import results
from torch_ps.compare.cli import summarise
from torch_ps.compare.events import read_journals
from torch_ps.compare.execute import Executed
from torch_ps.compare.results import Results
from torch_ps.compare.run_process import PlannedRun
from torch_ps.compare.runs import learning_rate, lr_rule, parse_runs

FILE = Path(__file__).with_name("results.json")


def golden() -> Results:
    return results.read(FILE)


def compute() -> Results:
    """The same from the events, without what depends on the day and the machine."""
    config = CompareConfig(samples=1024, batch_size=8, lr=3e-4, slow=("w1:3x",), evaluations=8, device="cpu")
    executed = Executed()
    with tempfile.TemporaryDirectory() as folder:
        runs = parse_runs(config.runs)
        for run in runs:
            rate = learning_rate(run, config.lr, config.workers, scaled=True)
            plan = PlannedRun(run, rate, Path(folder) / run.slug)
            job = Job(mode=run.mode, compress=run.compress, factors=(1.0, 3.0), samples=1024, lr=rate, evaluations=8)
            write(job, plan.events)
            executed.finished.append((plan, read_journals(plan.events)))
        found = summarise(executed, config, lr_rule(runs, config.lr, config.workers, scaled=True))
    settings = found.settings | {"machine": "a machine", "torch": "2.13.0", "torch_ps": "0.1.0"}
    return replace(found, created="2026-01-02T03:04:05+00:00", settings=settings)


if __name__ == "__main__":
    results.write(compute(), FILE)
