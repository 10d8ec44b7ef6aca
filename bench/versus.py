"""Compares torch-ps with other systems that do the same work, on this machine, in one run.

    python bench/versus.py                              # the table of docs/benchmark-log.md
    python bench/versus.py --only "sync big" --repeat 5
    python bench/versus.py --with ray,tensorflow        # also these, where they are installed

Two workers and one server, one compute thread per process. What a round is and how it is checked: ``bench/rounds.py``.

    network-fp32, network-fp16, memory   this project: over sockets, the same in 16 bits both ways, in shared memory
    grpc-fp32    this project with ``--plane grpc``
    tls-fp32, tls-grpc-fp32   network-fp32 and grpc-fp32 with TLS
    gloo         torch.distributed: one all-reduce of the flat gradient, each worker makes the step itself; has no async
    rpc-tcp, rpc torch.distributed.rpc as in PyTorch's tutorials: over TCP, and with the shared memory that it prefers
    shm, tcp     ceilings: shared memory with copies, in lock step; the same bytes over TCP without any arithmetic
    grpc         ceiling: the same bytes as messages of gRPC in Python, without any arithmetic
    ray, tensorflow   with --with

Rows are interleaved, ``--repeat`` times. Seconds, rounds and CPU seconds are medians over the repetitions; "x gloo" and
"x shm" are medians of the ratio of seconds to those of gloo, and of shm in the same mode, within one repetition, so a
load that lasts longer than a repetition cancels out. Async seconds are one over the rounds of all workers per second.
"server MiB" is the largest resident memory of the server during the rounds.
"""

import importlib.util
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pushpull, rounds
from bench.peers import common
from bench.pushpull import Case
from bench.rounds import Work

Figures = dict[str, float]
Record = dict[str, float | str | None]

#: This project's: codec and plane; those whose name begins with tls use TLS.
OURS = {
    "network-fp32": ("none", "network"),
    "network-fp16": ("fp16", "network"),
    "grpc-fp32": ("none", "grpc"),
    "tls-fp32": ("none", "network"),
    "tls-grpc-fp32": ("none", "grpc"),
    "memory": ("none", "memory"),
}
#: Others: module of bench/peers and variant.
PEERS = {
    "gloo": ("gloo", ""),
    "rpc-tcp": ("rpc", "tcp"),
    "rpc": ("rpc", ""),
    "shm": ("shm", ""),
    "tcp": ("tcp", ""),
    "grpc": ("grpc", ""),
}
#: Peers that are asked for: their module here, which is not named as what it imports, and that.
OPTIONAL = {"ray": "ray", "tensorflow": "tensorflow"}
#: Why a known system cannot be asked for.
REFUSED = {"mxnet": "its last release needs numpy < 1.24 and this project numpy >= 1.26, so no environment has both"}


@dataclass(frozen=True)
class Row:
    system: str
    mode: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.system} {self.mode} {self.size}"

    def run(self, work: Work) -> Figures:
        if self.system in OURS:
            codec, plane = OURS[self.system]
            tls = self.system.startswith("tls")
            return pushpull.run(Case(self.mode, codec, self.size, plane=plane, fused=True, tls=tls), work.workers, work)
        peer, variant = PEERS.get(self.system, (self.system, ""))
        figures = common.run(peer, work, variant)
        pushpull.check_error(self.name, figures)
        return figures


def rows(extra: list[str]) -> list[Row]:
    found = []
    for mode, size in (("sync", "big"), ("async", "big"), ("sync", "small"), ("async", "small")):
        for system in (*OURS, *PEERS, *extra):
            if not (system == "gloo" and mode == "async"):
                found.append(Row(system, mode, size))
    return found


def installed(wanted: str) -> list[str]:
    """Return the comma-separated ``wanted`` systems that can be imported; report why others cannot.

    Raises:
        SystemExit: a name is unknown.
    """
    found = []
    for name in filter(None, (each.strip() for each in wanted.split(","))):
        if name in REFUSED:
            sys.stderr.write(f"{name} does not run: {REFUSED[name]}\n")
        elif name not in OPTIONAL:
            raise SystemExit(f"--with knows {', '.join((*OPTIONAL, *REFUSED))}; got {name!r}")
        elif importlib.util.find_spec(OPTIONAL[name]) is None:
            sys.stderr.write(f"{name} does not run: it is not installed in this environment\n")
        else:
            found.append(name)
    return found


def seconds(row: Row, figures: Figures) -> float:
    return figures["seconds_per_round"] if row.mode == "sync" else 1 / figures["rounds_per_second"]


def summary(found: dict[Row, list[Figures]]) -> list[Record]:
    """A record per row: medians, and medians of ratios within a repetition."""
    return [_record(row, runs, found) for row, runs in found.items()]


def _record(row: Row, runs: list[Figures], found: dict[Row, list[Figures]]) -> Record:
    def ratio(system: str) -> float | None:
        others = found.get(Row(system, row.mode, row.size), [])
        ratios = [seconds(row, mine) / seconds(row, other) for mine, other in zip(runs, others, strict=False)]
        return statistics.median(ratios) if ratios else None

    def median(figure: str) -> float:
        return statistics.median(each[figure] for each in runs)

    return {
        "row": row.name,
        "seconds_per_round": statistics.median(seconds(row, each) for each in runs),
        "rounds_per_second": median("rounds_per_second"),
        "cpu_seconds_per_round": median("cpu_seconds_per_round"),
        "server_mib_in_rounds": max(each["server_mib_in_rounds"] for each in runs) or None,
        "ratio_to_gloo": ratio("gloo"),
        "ratio_to_shm": ratio("shm"),
        "error": max(each["error"] for each in runs),
    }


def text(table: list[Record]) -> str:
    heads = (
        ("s/round", "seconds_per_round", ".5f"),
        ("rounds/s", "rounds_per_second", ".1f"),
        ("CPU s/round", "cpu_seconds_per_round", ".5f"),
        ("server MiB", "server_mib_in_rounds", ".0f"),
        ("x gloo", "ratio_to_gloo", ".2f"),
        ("x shm", "ratio_to_shm", ".2f"),
        ("error", "error", ".0e"),
    )
    lines = [f"{'row':<26}" + "".join(f"{head:>12}" for head, _, _ in heads)]
    for record in table:
        cells = ("-" if record[key] is None else format(record[key], form) for _, key, form in heads)
        lines.append(f"{record['row']:<26}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = pushpull.options(__doc__)
    parser.add_argument("--with", dest="extra", default="", help=f"also these: {', '.join(OPTIONAL)}")
    arguments = parser.parse_args()
    named = {row.name: row for row in rows(installed(arguments.extra))}
    found: dict[Row, list[Figures]] = {named[name]: [] for name in pushpull.pick(list(named), arguments.only)}
    load = os.getloadavg()[0]
    try:
        for _ in range(1 if arguments.quick else arguments.repeat):
            for row, runs in found.items():
                runs.append(row.run(rounds.work(row.mode, row.size, quick=arguments.quick)))
                sys.stderr.write(f"{row.name}: {seconds(row, runs[-1]):.5f} s/round\n")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the table has what was measured until then\n")
    found = {row: runs for row, runs in found.items() if runs}
    table = summary(found)
    sys.stdout.write(text(table))
    if arguments.json:
        raw = {row.name: runs for row, runs in found.items()}
        report = {"rows": table, "runs": raw, "load_before": load, "cores": os.cpu_count()}
        Path(arguments.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
