"""Cost and takeover time of a standby: one shard, AdamW, two workers in sync mode, on one machine.

    python bench/standby.py
    python bench/standby.py --size big --stop 10 --mode async --plane network

Seconds per step without a standby and with one; then, several times, a primary is killed in a step, and the time from
the kill to the end of that step is taken. Workers notice a killed process by its connection, so the lease does not
matter for it; a server that is stopped or cut off is noticed by its silence, after a lease.

With ``--stop`` the standby stands still for so many seconds instead, less than a lease: by how much the primary's own
memory grows meanwhile, and how many steps the workers make.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import torch_ps
from bench.model import Model

START_SECONDS, LEASE = 120.0, 15.0


class Servers:
    """A primary, and a standby if one is wanted."""

    def __init__(self, folder: Path, *, standby: bool, mode: str = "sync") -> None:
        self._folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        self.address = self._start("--workers", "2", "--lease", str(LEASE), "--mode", mode)
        self.standby = self._start("--standby-of", self.address) if standby else ""

    def _start(self, *options: str) -> str:
        ready = self._folder / f"ready{len(self.processes)}"
        command = [
            sys.executable,
            "-m",
            "torch_ps.ps.server.cli",
            "--listen",
            "127.0.0.1:0",
            "--ready-file",
            str(ready),
        ]
        server = subprocess.Popen([*command, "--log-level", "error", *options])
        self.processes.append(server)
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("ps-serve has not started; its own lines say why")
            time.sleep(0.05)
        return str(json.loads(ready.read_text())["servers"][0])

    def wait(self) -> None:
        """Wait until the standby has every record."""
        from torch_ps.common.wire import address
        from torch_ps.worker.transport.link import Link

        link = Link(address.parse(self.address))
        while link.status(START_SECONDS).standby.role != "paired":
            time.sleep(0.05)
        link.close()

    def close(self) -> None:
        for each in self.processes:
            each.kill()
            each.wait()


def run(size: str, steps: int, *, standby: bool, kill: bool) -> tuple[float, float]:
    """Median seconds of a step, and from the kill to the end of the next step (0: there was none)."""
    with tempfile.TemporaryDirectory(prefix="bench-standby-") as folder:
        servers = Servers(Path(folder), standby=standby)
        spent: list[float] = []
        gone: list[float] = []
        ready = threading.Barrier(2, timeout=START_SECONDS)

        def work(rank: int) -> None:
            model = Model(size)
            inner = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            with torch_ps.ParameterServerOptimizer(inner, model, servers.address, name=f"w{rank}") as optimizer:
                optimizer.step()
                if standby and not rank:
                    servers.wait()
                ready.wait()
                for step in range(steps):
                    begin = time.perf_counter()
                    if kill and not rank and step == steps // 2:
                        servers.processes[0].send_signal(signal.SIGKILL)
                    optimizer.step()
                    if not rank:
                        (gone if kill and step == steps // 2 else spent).append(time.perf_counter() - begin)

        try:
            with ThreadPoolExecutor(2) as pool:
                for each in [pool.submit(work, rank) for rank in range(2)]:
                    each.result()
        finally:
            servers.close()
        return statistics.median(spent), gone[0] if gone else 0.0


def stop(size: str, seconds: float, mode: str, plane: str) -> str:
    """The primary's own memory and the steps of a worker, while the standby keeps up, is suspended, and continues."""
    with tempfile.TemporaryDirectory(prefix="bench-standby-") as folder:
        servers, over = Servers(Path(folder), standby=True, mode=mode), threading.Event()
        ready, steps = threading.Barrier(3, timeout=START_SECONDS), [0, 0]

        def work(rank: int) -> None:
            model = Model(size)
            inner = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            name = f"w{rank}"
            with torch_ps.ParameterServerOptimizer(inner, model, servers.address, name=name, plane=plane) as optimizer:
                optimizer.step()
                if not rank:
                    servers.wait()
                ready.wait()
                while not over.is_set():
                    optimizer.step()
                    steps[rank] += 1

        def phase(name: str) -> str:
            most, before, end = 0.0, steps[0], time.monotonic() + seconds
            while time.monotonic() < end:
                most = max(most, own(servers.processes[0].pid))
                time.sleep(0.02)
            return f"{name}: {most:.0f} MiB at most, {steps[0] - before} steps"

        try:
            with ThreadPoolExecutor(2) as pool:
                workers = [pool.submit(work, rank) for rank in range(2)]
                ready.wait()
                found = [phase("the standby keeps up")]
                servers.processes[1].send_signal(signal.SIGSTOP)
                found.append(phase(f"it stands still for {seconds:g} s"))
                servers.processes[1].send_signal(signal.SIGCONT)
                found.append(phase("it goes on"))
                over.set()
                for each in workers:
                    each.result()
        finally:
            over.set()
            servers.close()
        return "\n".join(found)


def own(pid: int) -> float:
    """Memory of a process in MiB without memory that it shares with workers."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="model of bench/model.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--stop", type=float, metavar="SECONDS", help="measure the primary's memory instead")
    parser.add_argument("--mode", default="sync", help="with --stop: mode of the job")
    parser.add_argument("--plane", default="auto", help="with --stop: plane of the workers")
    parser.add_argument("--quick", action="store_true", help="a few steps; the figures mean nothing")
    given = parser.parse_args()
    if not given.stop and (given.mode, given.plane) != ("sync", "auto"):
        parser.error("--mode and --plane are for --stop")
    if given.stop:
        sys.stdout.write(f"{stop(given.size, given.stop, given.mode, given.plane)}\n")
        return
    steps, kills = (6, 1) if given.quick else (given.steps, given.kills)
    without, _ = run(given.size, steps, standby=False, kill=False)
    with_one, _ = run(given.size, steps, standby=True, kill=False)
    seconds = [run(given.size, min(steps, 20), standby=True, kill=True)[1] for _ in range(kills)]
    sys.stdout.write(
        f"seconds per step: {without:.4f} without a standby, {with_one:.4f} with one ({with_one / without:.2f} x)\n"
        f"from kill -9 of the primary to the end of that step (lease {LEASE:g} s): median "
        f"{statistics.median(seconds):.2f} s of {', '.join(f'{each:.2f}' for each in sorted(seconds))}\n"
    )


if __name__ == "__main__":
    main()
