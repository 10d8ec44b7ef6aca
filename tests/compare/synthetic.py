"""Events as a real job writes them, made up: losses fall by a power law, workers have a speed, gradients are stale.

Also a program: ``python synthetic.py ARGS`` takes the command line of ``ps-run``, writes the events of such a job
where ``--events`` says and ends. What it does wrong on request is named by ``--task``:

    ok       all is well, at once
    crash    writes half of the events, complains and ends with exit code 3
    silent   ends well but has written nothing
    refuse   refuses its options as click does, with exit code 2
    hang     writes half of the events, starts a child and waits until it is stopped

With ``--batch-size auto`` worker w0 finds 32 and any other 16.

Nothing here trains; figures are only meant to look like those of a small GPT on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARAMETERS = 1_200_000
START = 1_750_000_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the made-up job is like. ``factors``: how many times as long each worker takes."""

    mode: str = "sync"
    compress: str = "none"
    factors: Sequence[float] = (1.0, 1.0)
    samples: int = 4096
    batch_size: int = 8
    lr: float = 3e-4
    seed: int = 0
    compute: float = 0.16
    evaluations: int = 16
    accuracy: bool = False
    text: str = "def forward(self, x):\n    return self.norm(x)"


def events_of(job: Job) -> list[list[dict[str, Any]]]:
    """One list of events per worker, in rank order."""
    chance = random.Random(f"{job.seed} {job.mode} {job.compress}")
    size = PARAMETERS * (4 if job.compress == "none" else 2)
    transport = 0.03 if job.compress == "none" else 0.018
    workers = [_start(job, rank) for rank in range(len(job.factors))]
    finished = [0.0] * len(workers)
    states = [{"step": 0, "samples": 0, "wait": 0.0, "pushed": 0, "version": 0} for _ in workers]
    version, total = 0, 0
    curve = [(0.0, 0)]
    while total < job.samples:
        if job.mode == "sync":
            ends = [
                now + job.compute * f * chance.uniform(0.95, 1.1) for now, f in zip(finished, job.factors, strict=True)
            ]
            closed = max(ends) + transport
            order = list(range(len(workers)))
            for rank in order:
                states[rank]["wait"] += closed - ends[rank]
            finished = [closed] * len(workers)
        else:
            rank = min(range(len(workers)), key=lambda r: finished[r] + job.compute * job.factors[r])
            finished[rank] += job.compute * job.factors[rank] * chance.uniform(0.95, 1.1) + transport
            states[rank]["wait"] += transport
            order = [rank]
        for rank in order:
            state = states[rank]
            total += job.batch_size
            stale = 0 if job.mode == "sync" else version - state["version"]
            version += job.mode != "sync" or rank == order[-1]
            state["version"] = version
            state["step"] += 1
            state["samples"] += job.batch_size
            state["pushed"] += size
            workers[rank].append(
                {
                    "event": "step",
                    "time": START + finished[rank],
                    "step": state["step"],
                    "samples": state["samples"],
                    "job_samples": total,
                    "loss": round(loss_at(job, total) + chance.gauss(0, 0.09), 4),
                    "staleness": stale,
                    "version": version,
                    "pushed_bytes": state["pushed"],
                    "pulled_bytes": state["step"] * PARAMETERS * 4,
                    "wait_seconds": round(state["wait"], 4),
                }
            )
        if total >= len(curve) * job.samples / job.evaluations:
            curve.append((max(finished) if job.mode == "sync" else finished[order[0]], total))
    for rank, (events, state) in enumerate(zip(workers, states, strict=True)):
        if rank == 0:
            events += [_evaluation(job, now, samples) for now, samples in curve]
            events.append({"event": "sample", "text": job.text})
        events.append(
            {
                "event": "end",
                "time": START + finished[rank],
                "steps": state["step"],
                "samples": state["samples"],
                "pushed_bytes": state["pushed"],
                "pulled_bytes": state["step"] * PARAMETERS * 4,
                "status": "ok",
            }
        )
    return workers


def loss_at(job: Job, samples: int) -> float:
    """Validation loss: from ln 256 down; async a little above sync, lossy gradients a hair above fp32."""
    penalty = 1.0 + (0.02 if job.mode != "sync" else 0.0) + (0.003 if job.compress != "none" else 0.0)
    return float(round(1.2 + 4.35 * penalty * (1 + samples / 260) ** -0.62, 4))


def write(job: Job, folder: Path, *, half: bool = False) -> None:
    """One file of JSON lines per worker; ``half`` leaves out the second half of the events."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, events in enumerate(events_of(job)):
        kept = events[: len(events) // 2] if half else events
        (folder / f"w{rank}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))


def found_sizes(folder: Path) -> None:
    """Let the start events say what each worker found."""
    for path in folder.glob("w*.jsonl"):
        start, *rest = path.read_text().splitlines(keepends=True)
        event = json.loads(start)
        size = 32 if path.stem == "w0" else 16
        event["settings"] |= {"batch_size": size, "batch_size_reason": f"what suits {path.stem}"}
        path.write_text("".join([json.dumps(event) + "\n", *rest]))


def _start(job: Job, rank: int) -> list[dict[str, Any]]:
    return [
        {
            "event": "start",
            "time": START - 0.02 * rank,
            "name": f"w{rank}",
            "rank": rank,
            "world": len(job.factors),
            "mode": job.mode,
            "device": "cpu",
            "task": "gpt",
            "parameters": PARAMETERS,
            "settings": {"batch_size": job.batch_size, "lr": job.lr},
        }
    ]


def _evaluation(job: Job, now: float, samples: int) -> dict[str, Any]:
    metrics = {"loss": loss_at(job, samples)}
    if job.accuracy:
        metrics["accuracy"] = round(0.98 - 0.88 * (metrics["loss"] - 1.2) / 4.5, 4)
    return {"event": "evaluation", "time": START + now, "job_samples": samples, "metrics": metrics}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, required=True)
    for name in ("mode", "task", "events"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--compress", default="none")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--batch-size", default="8")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--slow", action="append", default=[])
    given, _ = parser.parse_known_args(argv)
    factors = [1.0] * given.n
    for text in given.slow:
        name, factor = text.split(":")
        factors[int(name[1:])] = float(factor.rstrip("x"))
    job = Job(
        mode=given.mode,
        compress=given.compress,
        factors=factors,
        samples=given.samples,
        batch_size=32 if given.batch_size == "auto" else int(given.batch_size),
        lr=given.lr,
    )
    sys.stdout.write(f"synthetic job, {given.mode}, {given.task}\n")
    if given.task == "refuse":
        sys.stderr.write("w0 | Usage: ps-worker\nw0 | \nw0 | Error: there is no task 'refuse'\nps-run: stops\n")
        return 2
    failing = {"crash": "sync", "hang": "async"}.get(given.task) == given.mode
    if given.task != "silent":
        write(job, Path(given.events), half=failing)
        if given.batch_size == "auto":
            found_sizes(Path(given.events))
    if failing and given.task == "hang":
        # Who reads the other end of this pipe learns when the last process of this job is gone.
        pipe = os.open(os.environ["SYNTHETIC_PIPE"], os.O_WRONLY)
        subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=[pipe])
        signal.pause()
    if failing:
        sys.stderr.write("w1: the moon is in the wrong place\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
