"""ps-run --on ray on a cluster of two nodes: it learns, a killed worker comes back, and nothing is left."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.deploy.launched import LEARNED, accuracies, environment, process_with, started
from tests.docs.commands import shown
from tests.support import commands
from tests.support.jobs import SECONDS, until

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs ray, of the extra ray")

#: Two nodes on this host, until somebody closes stdin or kills it.
CLUSTER = """
import signal
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
print("\\nhere:", cluster.address, flush=True)
signal.sigwait({signal.SIGTERM})
cluster.shutdown()
"""


@needs_ray
@pytest.mark.timeout(600)
def test_killed_worker_and_killed_lead_come_back_on_ray_and_the_job_learns_and_is_kept(tmp_path: Path) -> None:
    (command,) = shown("docs/machines/ray.md", "ps-run --on ray -n 2 --shards 2 --task digits")
    (tmp_path / "cluster.py").write_text(CLUSTER)
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    with started(tmp_path, cluster=(f"exec {sys.executable} cluster.py", quiet)) as (cluster,):
        until(lambda: cluster.ends_within(0.2) or "\nhere: " in cluster.said, "the cluster is there", 3 * SECONDS)
        address = cluster.said.split("\nhere: ")[1].split()[0]
        # The other worker waits for the killed one, so that there is training left when it is back.
        variables = quiet | {"RAY_ADDRESS": address, "PS_LEASE": "60"}
        variables |= {"PS_CHECKPOINT": str(tmp_path / "kept"), "PS_CHECKPOINT_EVERY": "50"}
        with started(tmp_path, job=(f"exec {command}", variables)) as (job,):
            until(lambda: job.ends_within(0.2) or "rank 1 of 2" in job.said, "training runs", 3 * SECONDS)
            os.kill(
                process_with("torch_ps.worker.commands.worker", PS_SERVERS=servers_of(job.said), RANK="1"),
                signal.SIGKILL,
            )
            until(lambda: job.ends_within(0.2) or job.said.count("worker w1 joins") == 2, "w1 is back", 3 * SECONDS)
            until(lambda: job.ends_within(0.2) or "is good" in job.said, "a checkpoint is there", 3 * SECONDS)
            lead = servers_of(job.said).split(",")[0]
            os.kill(process_with("torch_ps.ps.server.cli", PS_WORKERS="2", PS_LISTEN=lead), signal.SIGKILL)
            assert job.wait(3 * SECONDS) == 0
            assert "shard 1 goes on from version" in job.said
            assert "is not kept" not in job.said
            assert "is good" in job.said[job.said.rindex("shard 0 stops") :]  # the last one, after all workers had left
            assert accuracies(job.said)[-1] >= LEARNED
            with pytest.raises(LookupError):  # the servers have ended too
                process_with("torch_ps.ps.server.cli", PS_WORKERS="2", PS_LISTEN=servers_of(job.said).split(",")[0])
        cluster.send(signal.SIGTERM)
        assert cluster.wait() == 0


def servers_of(said: str) -> str:
    """The addresses that ps-run has told."""
    return next(line.split(" servers ")[1] for line in said.splitlines() if "ps-run: servers " in line)


@needs_ray
def test_cluster_that_is_not_there_is_said() -> None:
    done = commands.run("ps-run", "--on", "ray", "--ray-address", "127.0.0.1:1", "--task", "digits")
    assert done.exit_code == 2
    assert "no Ray cluster at 127.0.0.1:1" in " ".join(done.stderr.split())


def test_options_of_ray_are_refused_elsewhere() -> None:
    done = commands.run("ps-run", "--restarts", "1", "--task", "digits")
    assert done.exit_code == 2
    assert "restarts=1 has no effect without on=ray" in " ".join(done.stderr.split())


def test_ray_is_loaded_by_nobody_who_does_not_ask_for_it() -> None:
    code = "import sys; from torch_ps.worker.commands import ray_launcher, run; sys.exit('ray' in sys.modules)"
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code], environment()) == 0
