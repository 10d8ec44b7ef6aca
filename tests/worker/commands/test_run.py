"""Whole jobs by ps-run, with real servers and workers."""

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.nohup import ignores_hangup

ROOT = Path(__file__).parents[3]
PS_RUN = [sys.executable, "-m", "torch_ps.worker.commands.run"]

#: Says which process it is, then waits for ever.
WAITING = "import os, signal\nprint('pid', os.getpid(), flush=True)\nsignal.pause()\n"


def ps_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PS_RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


@contextmanager
def waiting_job(tmp_path: Path, *before: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A job of two workers that wait, with the ids of all processes below ps-run; ``before`` comes before ps-run."""
    (tmp_path / "wait.py").write_text(WAITING)
    with subprocess.Popen(
        [*before, *PS_RUN, "-n", "2", str(tmp_path / "wait.py")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            workers = {int(process.stdout.readline().split()[-1]) for _ in range(2)}
            children = [
                int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ]
            assert workers < set(children)
            yield process, children
        finally:
            process.kill()


def gone(pid: int) -> bool:
    """Whether a process, which need not be a child of ours, ends in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 20)[0])
    finally:
        os.close(handle)


def events(folder: Path, worker: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / f"{worker}.jsonl").read_text().splitlines():
        event = json.loads(line)
        found.setdefault(event["event"], []).append(event)
    return found


def test_a_task_trains_and_says_what_it_did(tmp_path: Path) -> None:
    result = ps_run("-n2", "--task=digits", "--samples=12800", "--lr=0.4", "--evaluations=5", f"--events={tmp_path}")
    assert result.returncode == 0, result.stderr
    workers = [events(tmp_path, name) for name in ("w0", "w1")]
    for rank, found in enumerate(workers):
        start, end = found["start"][0], found["end"][0]
        assert (start["name"], start["rank"], start["world"], start["mode"]) == (f"w{rank}", rank, 2, "sync")
        assert (start["settings"]["lr"], start["settings"]["batch_size"], start["parameters"]) == (0.4, 32, 4810)
        assert (end["steps"], end["samples"], end["status"]) == (200, 6400, "ok")
        assert [step["job_samples"] for step in found["step"]] == list(range(64, 12801, 64))
        assert {step["staleness"] for step in found["step"]} == {0}
    points = workers[0]["evaluation"]
    assert [point["job_samples"] for point in points] == [0, 3200, 6400, 9600, 12800]
    assert points[-1]["metrics"]["accuracy"] > 0.85 > 0.3 > points[0]["metrics"]["accuracy"]
    assert "evaluation" not in workers[1]
    assert "w0 | " in result.stderr
    assert "w1 | " in result.stderr


def test_an_automatic_batch_size_is_said_and_is_the_one_that_trains(tmp_path: Path) -> None:
    result = ps_run("-n2", "--task=digits", "--samples=4096", "--batch-size=auto", f"--events={tmp_path}")
    assert result.returncode == 0, result.stderr
    for name in ("w0", "w1"):
        found = events(tmp_path, name)
        settings, first = found["start"][0]["settings"], found["step"][0]
        assert first["samples"] == settings["batch_size"]
        assert settings["batch_size"] in (1, 2, 4, 8, 16, 32, 64)
        assert settings["batch_size_reason"].startswith("the fastest on the CPU with ")
        assert f"batch size auto: {settings['batch_size']}, the fastest on the CPU" in result.stderr


def test_a_slow_worker_does_less_of_an_asynchronous_job(tmp_path: Path) -> None:
    options = (
        "--mode=async",
        "--shards=2",
        "--slow=w1:8x",
        "--compress=fp16",
        "--compress-pull=fp16",
        "--evaluations=0",
    )
    result = ps_run("-n2", "--task=digits", "--samples=6400", *options, f"--events={tmp_path}")
    assert result.returncode == 0, result.stderr
    fast, slow = (events(tmp_path, name) for name in ("w0", "w1"))
    assert slow["end"][0]["steps"] < fast["end"][0]["steps"]
    # The last pushes of both may be on their way together.
    assert 6400 <= fast["end"][0]["samples"] + slow["end"][0]["samples"] <= 6400 + 2 * 32
    assert "evaluation" not in fast


def test_the_example_trains_as_a_script() -> None:
    result = ps_run("-n2", "examples/train.py", "--epochs", "8")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "accuracy" in line]
    assert sorted(line.split(" | ")[0] for line in said) == ["w0", "w1"]
    assert all(float(line.split()[-1].rstrip("%")) > 90 for line in said)


def test_options_of_the_command_line_reach_the_optimizer_of_a_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, torch_ps\n"
        "model = torch.nn.Linear(100, 10, bias=False)\n"
        "with torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model) as optimizer:\n"
        "    rank = optimizer.rank\n"  # while both are sure to be there
        "    model(torch.ones(1, 100)).sum().backward()\n"
        "    optimizer.step()\n"
        "    print('sent', optimizer.pushed_bytes, 'received', optimizer.pulled_bytes, 'rank', rank)\n"
    )
    result = ps_run("-n2", "--compress=fp16", "--compress-pull=bf16", str(tmp_path / "train.py"))
    assert result.returncode == 0, result.stderr
    fp16, bf16_twice = 2 * 1000 + 4, 2 * 2 * 1000  # a scale goes with fp16; the first pull and the answer to the push
    told = [f"w{rank} | sent {fp16} received {bf16_twice} rank {rank}" for rank in range(2)]
    assert sorted(result.stdout.splitlines()) == told


def test_torch_distributed_and_two_models_of_a_script_work_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, torch_ps, torch.distributed as dist\n"
        "from torch.utils.data import DataLoader, DistributedSampler\n"
        "dist.init_process_group('gloo')\n"
        "nets = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]\n"
        "sgd = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]\n"
        "optimizers = [torch_ps.ParameterServerOptimizer(each, net) for each, net in zip(sgd, nets)]\n"
        "data = [torch.tensor([float(i)]) for i in range(8)]\n"
        "seen = []\n"
        "for batch in DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False)):\n"
        "    for net, optimizer in zip(nets, optimizers):\n"
        "        net(batch).sum().backward()\n"
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        "    seen += batch.flatten().int().tolist()\n"
        "total = torch.tensor(sum(seen))\n"
        "dist.all_reduce(total)\n"
        "print(seen, total.item(), *((each.job, each.version) for each in optimizers))\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    result = ps_run("-n2", "--models=critic,generator", str(tmp_path / "train.py"))
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [
        "w0 | [0, 2, 4, 6] 28 ('critic', 2) ('generator', 2)",
        "w1 | [1, 3, 5, 7] 28 ('critic', 2) ('generator', 2)",
    ]


@pytest.mark.parametrize("end", ["", "import sys; sys.exit()"])
def test_a_script_that_never_joins_ends_with_an_error(tmp_path: Path, end: str) -> None:
    (tmp_path / "train.py").write_text(f"print('done')\n{end}\n")
    result = ps_run("-n1", str(tmp_path / "train.py"))
    assert result.returncode == 1
    assert result.stdout == "w0 | done\n"
    assert "no worker has ever joined the job, so it has trained alone: wrap its optimizer in" in result.stderr


def test_a_script_whose_own_processes_join_has_joined(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, torch_ps\n"
        "model = torch.nn.Linear(1, 1)\n"
        "torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model).close()\n"
    )
    (tmp_path / "launch.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(tmp_path / 'train.py')!r}], check=True)\n"
    )
    result = ps_run("-n1", str(tmp_path / "launch.py"))
    assert result.returncode == 0, result.stderr


def test_a_failing_worker_ends_the_job_with_its_code_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, signal, sys\n"
        "os.write(1, b'pid %d\\n' % os.getpid())\n"  # at once: one of the two may be ended right after
        "if os.environ['RANK'] == '1': sys.exit(7)\n"
        "signal.pause()\n"
    )
    result = ps_run("-n2", str(tmp_path / "train.py"))
    assert result.returncode == 7
    assert "the job ends because w1 ended with exit code 7" in result.stderr
    assert all(gone(int(line.split()[-1])) for line in result.stdout.splitlines())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_whole_job(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with waiting_job(tmp_path) as (process, children):
        process.send_signal(number)
        assert process.wait(30) == code
        assert all(gone(pid) for pid in children)


def test_job_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    with waiting_job(tmp_path, "nohup") as (process, children):
        for pid in (process.pid, *children):
            assert ignores_hangup(pid)
            os.kill(pid, signal.SIGHUP)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


def test_job_whose_output_nobody_reads_ends_in_order(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text("while True:\n    print('hello', flush=True)\n")
    talk, folder = shlex.quote(str(tmp_path / "talk.py")), shlex.quote(str(tmp_path / "ck"))
    line = f"{shlex.join(PS_RUN)} -n 1 --checkpoint {folder} {talk} | head -n 2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 141, done.stderr
    assert done.stdout == "w0 | hello\n" * 2
    assert "ps | " in done.stderr
    assert "shard 0 stops" in done.stderr
    assert "Traceback" not in done.stderr


def test_job_that_keeps_no_checkpoint_does_not_end_with_0(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import shutil, sys, torch, torch_ps\n"
        "model = torch.nn.Linear(4, 1)\n"
        "with torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model) as optimizer:\n"
        "    shutil.rmtree(sys.argv[1])\n"  # as a disk that is unmounted
        "    model(torch.ones(1, 4)).sum().backward()\n"
        "    optimizer.step()\n"
    )
    folder = str(tmp_path / "ck")
    result = ps_run("-n1", "--checkpoint", folder, str(tmp_path / "train.py"), folder)
    assert result.returncode == 1
    assert "all workers have ended well, but ps ended with exit code 1: Error: shard 0 has ended" in result.stderr
    assert "no good one is known" in result.stderr
    result = ps_run("-n1", "--checkpoint", "/proc/nope", "--task=digits", "--samples=64")
    assert result.returncode == 1
    assert result.stderr.count("checkpoints cannot be written at /proc/nope") == 1
    assert "; make that place writable, or give another --checkpoint" in result.stderr
    assert "the job did not start: ps ended with exit code 1; its last line above says why" in result.stderr


def test_no_process_is_left_when_ps_run_is_killed(tmp_path: Path) -> None:
    with waiting_job(tmp_path) as (process, children):
        process.kill()
        assert all(gone(pid) for pid in children)


def test_the_job_ends_when_its_servers_do(tmp_path: Path) -> None:
    with waiting_job(tmp_path) as (process, children):
        server = children[0]  # started first; process ids may begin again at the lowest
        os.kill(server, signal.SIGKILL)
        assert process.wait(30) == 137
        assert process.stderr is not None
        assert "the job has lost its servers: ps was killed by SIGKILL" in process.stderr.read()
        assert all(gone(pid) for pid in children)


def test_servers_that_cannot_start_say_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ps_run("-n1", "--task=digits", f"--metrics=127.0.0.1:{port}")
    assert result.returncode not in (0, 137)
    assert "the job did not start: ps ended with exit code" in result.stderr
    assert f"ps | Error: cannot serve metrics on 127.0.0.1:{port}: Address already in use; choose" in result.stderr
