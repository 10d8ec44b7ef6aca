"""A Slurm cluster on this host: the daemons of Debian's slurm-wlm, a node with CPUs, and one that says it has GPUs.

They run as this user in a folder of their own, on free ports, without munge: authentication is not what is looked at.

Source: slurm.conf(5), gres.conf(5).
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.deploy.launched import Started, environment, free_port
from tests.support.jobs import SECONDS, until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
NODES = ("cpu0", "gpu0")
#: What the second node takes for GPUs: files of devices, which nobody opens.
GPUS = ("/dev/null", "/dev/zero")


def missing() -> str:
    """Why there is no Slurm here; empty: there is."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"needs Debian's slurm-wlm; {', '.join(absent)} not found" if absent else ""


class Cluster:
    """Commands of a running cluster; ``folder`` is where jobs are submitted from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.configuration = folder, folder / "slurm.conf"
        self.daemons: list[Started] = []

    def until(self, true: Callable[[], bool], what: str) -> None:
        """As of ``jobs``, but seldom enough that the controller has time for its work."""
        until(lambda: self.daemons[0].ends_within(0.2) or true(), what, 3 * SECONDS)

    def run(self, *command: str, **variables: str) -> str:
        """Run a command, which has to end well; returns its stdout."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment(PATH=_path(), SLURM_CONF=str(self.configuration), **variables),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def hurried(self, job: str) -> bool:
        """Whether a job of two parts that was requeued is under way; Slurm would let it wait for two minutes."""
        if self.state(job) != "PENDING":
            return True
        for part in (job, str(int(job) + 1)):
            with contextlib.suppress(AssertionError):  # it has begun meanwhile
                self.run("scontrol", "update", f"JobId={part}", "StartTime=now")
        return False

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED."""
        return dict(p.split("=", 1) for p in self.run("scontrol", "show", "job", job).split() if "=" in p)["JobState"]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    here = Cluster(folder)
    here.configuration.write_text(_configuration(folder))
    (folder / "gres.conf").write_text("".join(f"NodeName=gpu0 Name=gpu File={each}\n" for each in GPUS))
    (folder / "state").mkdir()
    commands = [["slurmctld", "-i", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    try:
        for command in commands:
            variables = environment(PATH=_path(), SLURM_CONF=str(here.configuration))
            here.daemons.append(
                Started(command, folder / f"{command[-1] if command[-1] in NODES else command[0]}.log", variables)
            )
        here.until(lambda: _idle(here), "all nodes are idle")
        yield here
        here.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        here.until(lambda: not here.run("squeue", "--noheader"), "no job is left")
    except BaseException as error:
        for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.out")):
            error.add_note(f"{path.name}:\n{path.read_text(encoding='utf-8', errors='replace')[-4000:]}")
        raise
    finally:
        for daemon in here.daemons:
            daemon.kill()


def _idle(here: Cluster) -> bool:
    with contextlib.suppress(AssertionError):
        return here.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES)
    return False  # the controller does not answer yet


def _configuration(folder: Path) -> str:
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000"
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=1
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
GresTypes=gpu
NodeName=cpu0 Port={free_port()} {node}
NodeName=gpu0 Port={free_port()} {node} Gres=gpu:{len(GPUS)}
PartitionName=cpu Nodes=cpu0 Default=YES State=UP
PartitionName=gpu Nodes=gpu0 State=UP
"""


def _path() -> str:
    """Debian has the daemons where only root looks."""
    return f"{environment()['PATH']}:/usr/sbin"
