"""Rounds over slow links: every worker and every shard on a node of its own, against the bound and against gloo.

    python bench/links.py                                # the table of docs/benchmark-log.md; needs root and iproute2
    python bench/links.py --rates 1000 --shards 4,2,1 --workers 4
    python bench/links.py --rates 1000 --shards 1 --workers 1 --round-trip 50 --connections 1,4,8

The nodes are namespaces on this machine (``bench/network.py``): their links are slow, but they share its cores. "cores"
says how many of them the run used on average, "all" how many there are. A row that uses all of them measures the cores.

With M bytes each way, n workers, k shards and links of B bytes per second in each direction, no parameter server needs
less than max(M/B, nM/(kB)) and no ring less than 2(n-1)M/(nB). "x bound" is the measured time over the former, for gloo
over the latter; "faster" is gloo's seconds over the row's. "tcp" is the same traffic between plain sockets, which says
what TCP and these links take. Headers of TCP, IP and Ethernet are not in the bound; with 1,500 bytes a frame they are 5
% of the link. The token buckets let bursts of 256 KiB through, so small models beat it.

Source: Jiang et al., "A unified architecture for accelerating distributed DNN training", OSDI 2020.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull, rounds
from bench.network import INTERFACE, Network, NoNetwork, check, enter, network
from bench.peers import flows
from bench.pushpull import Case
from bench.rounds import Job, Work

PORT = 50051
CODECS = {"fp32": ("none", 1.0), "fp16": ("fp16", 0.5)}
TCP = "tcp"
#: Warm and timed rounds; those of a link below 500 Mb/s take seconds each.
FAST, SLOW = (1, 5), (1, 2)


@dataclass(frozen=True)
class Row:
    """``shards`` 0: gloo's all-reduce. ``codec`` "tcp": the traffic of fp32 between plain sockets."""

    megabits: int
    workers: int
    shards: int
    codec: str
    size: str
    bucket: float | None = None  # MiB; None: the server's own choice
    round_trip: float = 0.0  # ms
    connections: int = 1  # to each data port

    @property
    def name(self) -> str:
        what = f"k={self.shards} {self.codec}" if self.shards else "gloo"
        more = f" N={self.connections}" if self.connections > 1 else ""
        return f"{self.megabits} Mb/s {what}{more}"

    @property
    def bound(self) -> float:
        """Seconds."""
        share = 1.0 if self.codec == TCP else CODECS[self.codec][1]
        seconds = 4 * numel(self.size) * share / (self.megabits * 1e6 / 8)
        if not self.shards:
            return 2 * (self.workers - 1) / self.workers * seconds
        return max(1.0, self.workers / self.shards) * seconds

    def run(self, work: Work) -> dict[str, float]:
        wires = network(self.workers + self.shards, self.megabits, self.round_trip / 1000)
        with wires as nodes, rounds.jobs(work) as job:
            if not self.shards:
                return rounds.gather(job, self.name, gloo_worker, nodes, server=None)
            if self.codec == TCP:
                return self._tcp(nodes, job)
            case = Case("sync", CODECS[self.codec][0], self.size, fused=True, connections=self.connections)
            addresses = [f"{nodes.address(self.workers + shard)}:{PORT}" for shard in range(self.shards)]
            commands = []
            for shard, address in enumerate(addresses):
                options = ["--insecure", "--listen", address]
                if self.bucket is not None:
                    options += ["--bucket-size", f"{self.bucket:g}"]
                if self.shards > 1:
                    options += ["--shard", f"{shard}/{self.shards}"]
                if shard:
                    options += ["--lead", addresses[0]]
                command = pushpull.serve_command(case, self.workers, *options)
                commands.append(nodes.command(self.workers + shard, command))
            with pushpull.serving(commands, job.folder) as (pids, _):
                servers = ",".join(addresses)
                return rounds.gather(job, self.name, ps_worker, nodes, case, servers, server=pids[0])

    def _tcp(self, nodes: Network, job: Job) -> dict[str, float]:
        servers = [(nodes.address(self.workers + shard), PORT) for shard in range(self.shards)]
        size = 4 * numel(self.size) // self.shards
        ready, arguments = rounds.context.Barrier(self.shards + 1), (self.workers, size)
        processes = [
            rounds.context.Process(
                target=flows_server, args=(nodes.names[self.workers + shard], servers[shard], *arguments, ready)
            )
            for shard in range(self.shards)
        ]
        for process in processes:
            process.start()
        try:
            ready.wait(rounds.DEADLINE)
            return rounds.gather(job, self.name, flows_worker, nodes, servers, server=None)
        finally:
            for process in processes:
                process.kill()
                process.join()


def numel(size: str) -> int:
    return rounds.flat(size)[0].numel()


def ps_worker(job: Job, rank: int, nodes: Network, case: Case, servers: str) -> None:
    enter(nodes.names[rank])
    pushpull.worker(job, rank, case, servers)


def gloo_worker(job: Job, rank: int, nodes: Network) -> None:
    enter(nodes.names[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    from bench.peers import gloo

    gloo.worker(job, rank)


def flows_server(node: str, address: tuple[str, int], workers: int, size: int, ready: Barrier) -> None:
    enter(node)
    with socket.create_server(address) as listener:
        ready.wait(rounds.DEADLINE)
        flows.serve(listener, workers, size)


def flows_worker(job: Job, rank: int, nodes: Network, servers: list[tuple[str, int]]) -> None:
    enter(nodes.names[rank])
    flows.worker(job, rank, servers)


def text(found: dict[Row, list[dict[str, float]]]) -> str:
    lines = [f"{'row':<20}{'s/round':>10}{'bound s':>10}{'x bound':>9}{'faster':>8}{'cores':>7}{'all':>5}{'error':>8}"]
    for row, runs in found.items():
        seconds = rounds.seconds(runs)
        gloo = [each for other, each in found.items() if not other.shards and other.megabits == row.megabits]
        faster = f"{rounds.seconds(gloo[0]) / seconds:.2f}" if gloo else "-"
        cores = statistics.median(each["cores_used"] for each in runs)
        lines.append(
            f"{row.name:<20}{seconds:>10.3f}{row.bound:>10.3f}{seconds / row.bound:>9.2f}{faster:>8}"
            f"{cores:>7.2f}{os.cpu_count():>5}{max(each['error'] for each in runs):>8.0e}"
        )
    return "\n".join(lines) + "\n"


def rows(wanted: argparse.Namespace) -> Iterator[Row]:
    """The rows of all combinations of what is wanted."""
    more = {"size": wanted.size, "bucket": wanted.bucket_size, "round_trip": wanted.round_trip}
    for rate in wanted.rates:
        if wanted.workers > 1:
            yield Row(rate, wanted.workers, 0, "fp32", **more)
        for shards, codec in itertools.product(wanted.shards, (TCP, *CODECS)):
            for connections in (1,) if codec == TCP else wanted.connections:
                yield Row(rate, wanted.workers, shards, codec, **more, connections=connections)


def positive(words: str) -> list[int]:
    return rounds.numbers(words, 1)


def main() -> None:
    parser = pushpull.options(__doc__, repeat=1)
    parser.add_argument("--rates", type=positive, default="1000,100", help="Mb/s of the links, comma-separated")
    parser.add_argument("--shards", type=positive, default="4,1", help="numbers of shards, comma-separated")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--round-trip", type=float, default=0.0, help="ms of a round trip; default: this machine's")
    parser.add_argument("--connections", type=positive, default="1", help="connections to a data port, comma-separated")
    parser.add_argument("--bucket-size", type=float, help="MiB of a bucket; default: that of ps-serve")
    parser.add_argument("--size", choices=("big", "small"), default="big")
    arguments = parser.parse_args()
    try:
        check()
        named = {row.name: row for row in rows(arguments)}
        found: dict[Row, list[dict[str, float]]] = {named[n]: [] for n in pushpull.pick(list(named), arguments.only)}
        for _ in range(1 if arguments.quick else arguments.repeat):
            for row, runs in found.items():
                warm, timed = rounds.QUICK if arguments.quick else FAST if row.megabits >= 500 else SLOW
                runs.append(row.run(Work("sync", row.size, row.workers, warm, timed)))
                pushpull.check_error(row.name, runs[-1], "none" if row.codec == TCP else CODECS[row.codec][0])
                sys.stderr.write(f"{row.name}: {runs[-1]['seconds_per_round']:.3f} s/round\n")
    except NoNetwork as error:
        sys.stderr.write(f"links cannot be emulated here: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.write(text(found))
    if arguments.json:
        figures = [{"row": row.name, "bound": row.bound, "runs": runs} for row, runs in found.items()]
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
