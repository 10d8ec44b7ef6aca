"""SIGTERM: a worker finishes its step and leaves with exit code 0; a second one ends it at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import SECONDS, job, until

ROOT = Path(__file__).parents[3]
PYTHON = [sys.executable]
PS_WORKER = [sys.executable, "-m", "torch_ps.worker.commands.worker"]
PS_RUN = [sys.executable, "-m", "torch_ps.worker.commands.run", "-n", "2"]

#: Ten steps; what has to happen in the third is put in.
SCRIPT = """
import os, signal, sys, torch, torch_ps
from torch_ps.worker.runtime import graceful_shutdown
def term(): os.kill(os.getpid(), signal.SIGTERM)
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


def start(command: list[str], path: str, servers: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*command, path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PS_SERVERS": str(servers)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(path).parent,
    )


def run(command: list[str], path: str, servers: object) -> tuple[int, list[str], str]:
    with start(command, path, servers) as process:
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out.splitlines(), err


@pytest.mark.parametrize("command", [PYTHON, PS_WORKER])
def test_sigterm_lets_the_step_finish_and_leaves(command: list[str], tmp_path: Path) -> None:
    with job() as servers:
        code, lines, err = run(command, script(tmp_path), servers)
        status = servers.status()
        assert "worker w0 leaves" in servers.log
    assert (code, lines) == (0, ["1", "2", "cleaned up"]), err
    assert status.version == 3
    assert not status.worker


def test_handler_of_the_script_stays(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: print('own', flush=True))"
    with job() as servers:
        code, lines, err = run(PYTHON, script(tmp_path, before=before), servers)
    assert (code, lines) == (0, ["1", "2", "own", *map(str, range(3, 11)), "cleaned up"]), err


def test_second_sigterm_does_not_wait_for_the_step(tmp_path: Path) -> None:
    with job() as servers:
        code, lines, err = run(PS_WORKER, script(tmp_path, third="term(); term()"), servers)
    assert (code, lines) == (143, ["1", "2", "cleaned up"]), err


def test_step_that_does_not_end_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    before, third = "graceful_shutdown.STEP_SECONDS = 0.2", "term(); signal.pause(); signal.pause()"
    with job() as servers:
        code, lines, err = run(PS_WORKER, script(tmp_path, third=third, before=before), servers)
    assert (code, lines) == (143, ["1", "2", "cleaned up"]), err


def test_what_accumulate_has_gathered_goes_to_the_others(tmp_path: Path) -> None:
    with job() as servers:
        code, lines, err = run(PYTHON, script(tmp_path, options="{'accumulate': 2}"), servers)
        status = servers.status()
    # The third and fourth pass have version 1, so versions 1 1 2 2 ...: SIGTERM comes in the first pass of step 3.
    assert (code, lines) == (0, ["0", "1", "1", "2", "cleaned up"]), err
    assert status.version == 2


def test_worker_that_waits_for_samples_leaves_at_once(tmp_path: Path) -> None:
    with job(workers=2) as servers, start(PS_WORKER, script(tmp_path), servers) as process:
        until(lambda: any(w.waiting_seconds > 0 for w in servers.status().worker), "w0 waits for the first workers")
        process.terminate()
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (0, "cleaned up\n"), err
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
    code = subprocess.run([*PYTHON, "-c", WAIT], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (code.returncode, code.stdout) == (0, "[False, True]\n"), code.stderr


def test_job_of_ps_run_goes_on_without_a_worker_that_was_told_to_leave(tmp_path: Path) -> None:
    path = script(tmp_path, third="term() if os.environ['RANK'] == '1' else None")
    code, lines, err = run(PS_RUN, path, "")
    assert code == 0, err
    assert [line for line in lines if line.startswith("w1")] == ["w1 | 1", "w1 | 2", "w1 | cleaned up"]
    # 100 samples: 3 steps of 20, of which w1 has pushed its part, and 4 of 10.
    assert [line for line in lines if line.startswith("w0")] == [*(f"w0 | {i}" for i in range(1, 8)), "w0 | cleaned up"]
