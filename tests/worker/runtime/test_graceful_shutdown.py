"""SIGTERM or SIGHUP: a worker finishes its step and leaves with exit code 0; a second one ends it at once."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.jobs import SECONDS, job, until
from tests.support.processes import Child

#: Ten steps; what has to happen in the third is put in.
SCRIPT = """
import os, signal, sys, torch, torch_ps
from torch_ps.worker.runtime import graceful_shutdown
def term(): os.kill(os.getpid(), signal.SIGTERM)
def hang_up(): os.kill(os.getpid(), signal.SIGHUP)
{before}
model = torch.nn.Linear(2, 1)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = torch_ps.ParameterServerOptimizer(sgd, model, name=os.environ.get("PS_NAME") or "w0", **{options})
try:
    for (x,) in torch_ps.shard(torch.utils.data.TensorDataset(torch.ones(100, 2)), optimizer, batch_size=10):
        model(x).sum().backward()
        if optimizer.version == 2:
            {third}
        optimizer.step()
        optimizer.zero_grad()
        print(optimizer.version, flush=True)
finally:
    print("cleaned up", flush=True)
"""


def script(folder: Path, third: str = "term()", before: str = "", options: str = "{}") -> str:
    path = folder / "train.py"
    path.write_text(SCRIPT.format(third=third, before=before, options=options))
    return str(path)


#: Runs a script, given servers: its exit code, the lines of its stdout, and its stderr.
Run = Callable[[str, object], tuple[int, list[str], str]]


def by_ps_worker(path: str, servers: object) -> tuple[int, list[str], str]:
    result = commands.run("ps-worker", "--servers", str(servers), path)
    return result.exit_code, result.stdout.splitlines(), result.stderr


def by_python(path: str, servers: object) -> tuple[int, list[str], str]:
    return in_fresh_interpreter(path, PS_SERVERS=str(servers))


def by_ps_run(path: str) -> tuple[int, list[str], str]:
    return in_fresh_interpreter("-m", "torch_ps.worker.commands.run", "-n", "2", path)


def in_fresh_interpreter(*arguments: str, **variables: str) -> tuple[int, list[str], str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**commands.environment(), **variables},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(("run", "third"), [(by_python, "term()"), (by_ps_worker, "hang_up()")])
def test_signal_lets_the_step_finish_and_leaves(run: Run, third: str, tmp_path: Path) -> None:
    with job() as servers:
        code, lines, err = run(script(tmp_path, third), servers)
        status = servers.status()
        assert "worker w0 leaves" in servers.log
    assert (code, lines) == (0, ["1", "2", "cleaned up"]), err
    assert status.version == 3
    assert not status.worker


def test_handler_of_the_script_stays(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: print('own', flush=True))"
    with job() as servers:
        code, lines, err = by_ps_worker(script(tmp_path, before=before), servers)
    assert (code, lines) == (0, ["1", "2", "own", *map(str, range(3, 11)), "cleaned up"]), err


def test_worker_under_nohup_goes_on_where_its_terminal_closes(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with job() as servers:
        code, lines, err = by_ps_worker(script(tmp_path, third="hang_up()", before=before), servers)
    assert (code, lines) == (0, [*map(str, range(1, 11)), "cleaned up"]), err


def test_second_signal_does_not_wait_for_the_step(tmp_path: Path) -> None:
    with job() as servers:
        code, lines, err = by_ps_worker(script(tmp_path, third="term(); hang_up()"), servers)
    assert (code, lines) == (129, ["1", "2", "cleaned up"]), err


def test_step_that_does_not_end_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    before, third = "graceful_shutdown.STEP_SECONDS = 0.2", "term(); signal.pause(); signal.pause()"
    with job() as servers:
        code, lines, err = by_ps_worker(script(tmp_path, third=third, before=before), servers)
    assert (code, lines) == (143, ["1", "2", "cleaned up"]), err


def test_what_accumulate_has_gathered_goes_to_the_others(tmp_path: Path) -> None:
    with job() as servers:
        code, lines, err = by_ps_worker(script(tmp_path, options="{'accumulate': 2}"), servers)
        status = servers.status()
    # The third and fourth pass have version 1, so versions 1 1 2 2 ...: SIGTERM comes in the first pass of step 3.
    assert (code, lines) == (0, ["0", "1", "1", "2", "cleaned up"]), err
    assert status.version == 2


def test_worker_that_waits_for_samples_leaves_at_once(tmp_path: Path) -> None:
    with job(workers=2) as servers:
        worker = Child(
            commands.PROGRAMS["ps-worker"], (["--servers", str(servers), script(tmp_path)],), tmp_path / "log"
        )
        until(lambda: any(w.waiting_seconds > 0 for w in servers.status().worker), "w0 waits for the first workers")
        assert worker.end() == 0, worker.output
        assert worker.output.splitlines()[-1] == "cleaned up"
        assert not servers.status().worker


WAIT = """
import os, signal, threading
from torch_ps.worker.runtime import graceful_shutdown
class Optimizer: pass
held, enders, ended = Optimizer(), [], threading.Event()
def end():
    enders.append(threading.current_thread() is threading.main_thread())
    ended.set()
graceful_shutdown.attach(held)
with graceful_shutdown.interruptible(end):
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended.wait(10)
with graceful_shutdown.interruptible(end):  # SIGTERM came just before the wait
    pass
print(enders)
"""


def test_wait_is_ended_from_another_thread_and_not_by_an_exception_within_it() -> None:
    code, lines, err = in_fresh_interpreter("-c", WAIT)
    assert (code, lines) == (0, ["[False, True]"]), err


def test_job_of_ps_run_goes_on_without_a_worker_that_was_told_to_leave(tmp_path: Path) -> None:
    path = script(tmp_path, third="term() if os.environ['RANK'] == '1' else None")
    code, lines, err = by_ps_run(path)
    assert code == 0, err
    assert [line for line in lines if line.startswith("w1")] == ["w1 | 1", "w1 | 2", "w1 | cleaned up"]
    # 100 samples: 3 steps of 20, of which w1 has pushed its part, and 4 of 10.
    assert [line for line in lines if line.startswith("w0")] == [*(f"w0 | {i}" for i in range(1, 8)), "w0 | cleaned up"]
