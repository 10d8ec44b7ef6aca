"""Cost and saving of a codec: MB of fp32 per second, and whether it pays on a 1 Gb/s link.

    python bench/codec.py                  # the table of docs/performance.md
    python bench/codec.py --link 10        # the verdict for a 10 Gb/s link

One bucket of 4 MiB of fp32 gradients, normal and scaled by a log-normal factor per block so that neither zeros nor one
scale flatter a codec; one thread. "encode" is the codec alone, "with feedback" what a worker does before each push
(``worker.compress``): add the residual, encode, decode, keep what was left out; for codecs that need none it is the
check and the encoding. "decode" is the server's part, with the check of the payload.

A codec pays where the seconds that worker and server spend are fewer than the link's seconds that it saves; "spends" is
the first as a share of the second. Seconds are CPU seconds of the one thread that computes. Each figure is the best
median of ``--repeat`` interleaved turns: other load on the machine only ever adds time.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

CODECS = ("none", "fp16", "bf16", "int8", "sign", "topk:0.01", "topk:0.001", "randk:0.01")
NUMEL = 1 << 20
SIZE = 4 * NUMEL
#: Calls of which one turn takes the median.
CALLS = 9


@dataclass(frozen=True)
class Row:
    """Seconds are per bucket. ``link_saved`` is the time that the bytes not sent would take on the link."""

    codec: str
    payload: int
    encode: float
    push: float
    decode: float
    link_saved: float

    @property
    def ratio(self) -> float:
        return SIZE / self.payload

    @property
    def pays(self) -> bool:
        return self.push + self.decode < self.link_saved


def cases(name: str) -> "tuple[int, dict[str, Callable[[], float]]]":
    """Bytes of the payload, and per figure a function that does it once and returns its seconds."""
    import torch

    from torch_ps.common import codecs
    from torch_ps.common.plan import Bucket
    from torch_ps.worker.gradients.compressor import Compressor

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(NUMEL, generator=generator)
    gradient.view(-1, 4096).mul_(torch.randn(NUMEL // 4096, 1, generator=generator).exp_()).mul_(1e-3)
    codec, compressor = codecs.codec(name), Compressor(name, worker="w0")
    bucket = Bucket(index=0, shard=0, rule="optimizer", group=0, numel=NUMEL, pieces=())
    values, scratch = torch.empty(NUMEL), torch.empty(NUMEL)
    payload = memoryview(b"".join(codec.encode(gradient, 1)))
    step = 0

    def encode() -> float:
        begin = time.thread_time()
        codec.encode(gradient, 1)
        return time.thread_time() - begin

    def push() -> float:
        nonlocal step
        values.copy_(gradient)
        step += 1
        begin = time.thread_time()
        compressor.encode(bucket, values, step=step, weight=1.0)
        return time.thread_time() - begin

    def decode() -> float:
        begin = time.thread_time()
        codec.check(payload, NUMEL)
        codec.decode(payload, scratch)
        return time.thread_time() - begin

    return len(payload), {"encode": encode, "push": push, "decode": decode}


def measure(names: list[str], repeat: int, link: float) -> list[Row]:
    """One row per codec; ``link`` is in gigabits per second."""
    made = {name: cases(name) for name in names}
    best: dict[tuple[str, str], float] = {}
    for _ in range(repeat):
        for name, (_, calls) in made.items():
            for figure, call in calls.items():
                call()  # warm: caches, and the residual's memory
                seconds = statistics.median(call() for _ in range(CALLS))
                best[name, figure] = min(seconds, best.get((name, figure), seconds))
    rows = []
    for name, (payload, _) in made.items():
        saved = max(0.0, (SIZE - payload) * 8 / (link * 1e9))
        figures = {figure: best[name, figure] for figure in ("encode", "push", "decode")}
        rows.append(Row(name, payload, **figures, link_saved=saved))
    return rows


def table(rows: list[Row], link: float) -> str:
    saves = f"{link:g} Gb/s saves"
    lines = [
        f"{'codec':<12}{'times smaller':>14}{'encode MB/s':>13}{'with feedback':>15}{'decode MB/s':>13}"
        f"{'costs ms':>10}{saves + ' ms':>18}{'spends':>8}  pays"
    ]
    for row in rows:
        cost = row.push + row.decode
        spends = f"{cost / row.link_saved:.0%}" if row.link_saved else "-"
        verdict = "-" if row.codec == "none" else "yes" if row.pays else "NO"
        lines.append(
            f"{row.codec:<12}{row.ratio:>14.2f}{_rate(row.encode):>13}{_rate(row.push):>15}"
            f"{_rate(row.decode):>13}{1e3 * cost:>10.2f}{1e3 * row.link_saved:>18.2f}{spends:>8}  {verdict}"
        )
    return "\n".join(lines)


def _rate(seconds: float) -> str:
    """MB of fp32 per second; "no copy" for a codec that does not touch the values."""
    return "no copy" if seconds < 5e-5 else f"{SIZE / seconds / 1e6:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="codecs to measure, comma-separated; any that exists")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--link", type=float, default=1.0, help="gigabits per second of the link of the verdict")
    parser.add_argument("--quick", action="store_true", help="one turn, to see that it works")
    parser.add_argument("--json", default="", help="file for all figures")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(CODECS)
    rows = measure(names, 1 if arguments.quick else arguments.repeat, arguments.link)
    sys.stdout.write(table(rows, arguments.link) + "\n")
    if arguments.json:
        records = [{**asdict(row), "numel": NUMEL, "link_gbps": arguments.link, "pays": row.pays} for row in rows]
        Path(arguments.json).write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
