"""One run as a child process: command line of ps-run, log, events, end.

Rules of this file
  1. The command line defines a run completely, so the command that is shown is the one that ran; ``PS_`` variables are
     not passed on.
  2. No process of a run outlives this object: it sends SIGTERM, and after a while SIGKILL to the process group.

    DIR/sync-fp32/log.txt          output of ps-run and its children
    DIR/sync-fp32/events/w0.jsonl  event log of worker 0
    DIR/sync-fp32/trace.json       timeline of all processes in --trace-steps

Source: setpgid(2) for process groups, prctl(2) for PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch_ps.common.errors import PsError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare.runs import Run

#: The program behind the console script ``ps-run``, run by this interpreter.
PS_RUN = (sys.executable, "-m", "torch_ps.worker.commands.run")

#: Seconds that ps-run gets to stop its children before the process group is killed.
PATIENCE = 15.0


#: Exit code of a program that refuses its options.
USAGE_ERROR = 2


class RunFailed(PsError):
    """A run did not finish; the message ends with the last lines of its log."""


class RunRefused(RunFailed):
    """ps-run or a worker refused an option, such as a task that does not exist or data that cannot be read."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run to execute.

    Attributes:
        run: mode and options.
        lr: learning rate; 0 leaves it to the task.
        folder: folder for log and events.
        seed: seed of this run; None if the comparison has one seed only.
    """

    run: Run
    lr: float
    folder: Path
    seed: int | None = None

    @property
    def place(self) -> tuple[str, ...]:
        """Path of the run's folder relative to that of the comparison, in parts."""
        return (self.run.slug,) if self.seed is None else (self.run.slug, f"seed-{self.seed}")

    @property
    def name(self) -> str:
        """Name that progress and failures show."""
        return self.run.name if self.seed is None else f"{self.run.name}, seed {self.seed}"

    @property
    def events(self) -> Path:
        return self.folder / "events"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def arguments(plan: PlannedRun, config: CompareConfig, *, events: bool = True) -> list[str]:
    """Arguments of ps-run for a run.

    Args:
        plan: run to execute.
        config: options that all runs share; 0 and "" leave a value to the task.
        events: whether to include the paths of events, TensorBoard files and trace, which a repetition does not need.
    """
    shared = {
        "task": config.task,
        "data": config.data,
        "samples": config.samples,
        "batch-size": config.batch_size or "",
        "seed": config.seed if plan.seed is None else plan.seed,
        "device": config.device,
        "shards": config.shards,
        "threads": config.threads,
        "evaluations": config.evaluations,
        "tls-ca": config.tls_ca,
        "tls-cert": config.tls_cert,
        "tls-key": config.tls_key,
        "token-file": config.token_file,
        "mode": plan.run.job_mode,
        "lr": f"{plan.lr:.8g}" if plan.lr else "",
    }
    given = {**{flag: str(value) for flag, value in shared.items() if value != ""}, **plan.run.options}
    flags = [f"--{flag}={value}" for flag, value in given.items()]
    flags += [f"--slow={text}" for text in config.slow]
    if events:
        flags.append(f"--events={plan.events}")
        if config.tensorboard:
            flags.append(f"--tensorboard={Path(config.tensorboard, *plan.place)}")
        if config.trace_steps:
            flags += [f"--trace={plan.folder / 'trace.json'}", f"--trace-steps={config.trace_steps}"]
    return ["-n", str(config.workers), *flags]


def command_line(plan: PlannedRun, config: CompareConfig) -> str:
    """Command that repeats this run, for people."""
    return shlex.join(["ps-run", *arguments(plan, config, events=False)])


def child_environment(base: Mapping[str, str]) -> dict[str, str]:
    """``base`` without the variables that are options."""
    return {name: value for name, value in base.items() if not name.startswith("PS_")}


class Child:
    """A running ``ps-run`` in a process group of its own. A context manager: leaving it ends the group."""

    def __init__(self, command: Sequence[str], plan: PlannedRun) -> None:
        self.plan = plan
        plan.events.mkdir(parents=True)
        with plan.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=child_environment(os.environ),
                    start_new_session=True,
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                )
            except OSError as error:
                raise RunFailed(f"cannot start {shlex.join(command)}: {error}") from error

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after ``seconds``."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def stop(self) -> None:
        """Send SIGTERM, wait up to ``PATIENCE``, then kill the rest of the group. Another Ctrl-C ends the wait."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                self.wait(PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def failure(self, what: str) -> RunFailed:
        """Error with ``what`` and the last lines of the log."""
        tail = last_lines(self.plan.log)
        return RunFailed(f"{what}\n{tail}" if tail else f"{what}; it wrote nothing to its log")


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"ps-run ended with exit code {code}"
    try:
        return f"ps-run was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ps-run was ended by signal {-code}"


def refusal(path: Path) -> str:
    """The text after the last "Error:" in a log; "" if there is none."""
    lines = [line.partition("Error: ")[2] for line in last_lines(path, 40).splitlines()]
    return next((line for line in reversed(lines) if line), "")


def last_lines(path: Path, count: int = 8) -> str:
    """The last ``count`` lines of a log that are not empty."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def _end_with_parent() -> None:
    """In the child: let the kernel send SIGTERM when ps-compare is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
