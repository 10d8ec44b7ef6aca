"""The job of deploy/slurm on a real Slurm: two parts, a killed worker, requeues, a killed server, what is left."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy import slurm
from tests.deploy.launched import LEARNED, ROOT, accuracies, process_with
from tests.docs.commands import shown

SBATCH = ROOT / "deploy/slurm/train.sbatch"
#: A node of the test has no more.
SMALL = "--cpus-per-task=1 --mem-per-cpu=100M"


def test_script_is_sound_shell() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck, of the extra dev")
    done = subprocess.run([shellcheck, str(SBATCH)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_HET_SIZE": "2"}, "nothing to train: sbatch train.sbatch SCRIPT"),
        ({}, "a job of two parts, servers and workers, is needed"),
    ],
)
def test_script_says_what_is_missing(variables: dict[str, str], says: str) -> None:
    done = subprocess.run(
        ["bash", str(SBATCH)], env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, says in done.stderr) == (2, True)


@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_killed_worker_comes_back_and_a_requeued_job_goes_on_to_what_it_should_learn(tmp_path: Path) -> None:
    (command,) = shown("docs/machines/slurm.md", "sbatch --partition")
    command = command.replace(" : ", f" {SMALL} : {SMALL} ").replace("deploy/slurm/train.sbatch", str(SBATCH))
    with slurm.cluster(tmp_path) as cluster:
        # The other worker waits for the killed one, so that there is training left when it is back.
        job = cluster.run("sbatch", "--parsable", *shlex.split(command)[1:], PS_LEASE="60", PS_CHECKPOINT_EVERY="100")
        log = tmp_path / f"torch-ps-{job}.out"

        def said(text: str, times: int = 1) -> bool:
            assert cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), "the job has ended"
            return log.exists() and log.read_text().count(text) >= times

        cluster.until(lambda: said("rank 1 of 2"), "training runs")
        os.kill(process_with("ps-worker", RANK="1", PS_TOKEN_FILE=f"{tmp_path}/torch-ps-{job}/token"), signal.SIGKILL)
        cluster.until(lambda: said("worker w1 joins", times=2), "w1 is back")
        assert said("worker w1 ended with exit code 137 and is started again")
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # as two minutes before the time is up
        cluster.until(lambda: cluster.state(job) == "PENDING", "the job is queued again")
        assert said("SIGTERM: worker w0 has finished its step")
        assert said("is good")
        cluster.until(lambda: cluster.hurried(job), "the job runs again")
        cluster.until(lambda: said("rank 1 of 2", times=3), "training goes on")
        server = process_with("ps-serve", SLURM_PROCID="1", PS_TOKEN_FILE=f"{tmp_path}/torch-ps-{job}/token")
        os.kill(server, signal.SIGKILL)
        cluster.until(lambda: cluster.state(job) == "PENDING", "the job is queued again after the death of a server")
        assert said("the servers have ended before the workers")
        cluster.until(lambda: cluster.hurried(job), "the job runs again")
        cluster.until(lambda: cluster.state(job) == "COMPLETED", "the job ends well")
        assert "goes on from version" in log.read_text()
        assert accuracies(log.read_text())[-1] >= LEARNED
    folder = tmp_path / f"torch-ps-{job}"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints"]
    assert folder.stat().st_mode & 0o077 == 0
