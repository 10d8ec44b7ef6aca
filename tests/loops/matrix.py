"""python -m tests.loops.matrix: every kind of loops on every plane, with every overlap, with one worker and two.

Prints a markdown table: "=" where the bits are plain torch's after each line, "r" with the words of the error that is
raised before anything is applied, "D" where the two part. A kind that the documentation of an overlap excludes stands
in brackets, whatever comes of it: it breaks the promise of "eager", or keeps views that "forward" cannot see.
"""

import sys
import time
import warnings
from collections import Counter

import click
import torch

from tests.loops.registry import Kind, load
from tests.loops.served import OVERLAPS, PLANES, compare


@click.command(context_settings={"show_default": True})
@click.option("--only", default="", help="Kinds whose name or subject has this in it.")
@click.option("--planes", default=",".join(PLANES), help="Planes.")
@click.option("--overlaps", default=",".join(OVERLAPS), help="Values of overlap.")
@click.option("--workers", default="1,2", help="Numbers of workers.")
@click.option("--shards", default=1, help="Servers of each job.")
@click.option("--every", default=1, help="One kind out of so many.")
def main(only: str, planes: str, overlaps: str, workers: str, shards: int, every: int) -> None:
    """Compare every kind of loops with plain torch, over real servers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds = [kind for kind in load().values() if only in kind.name or only == kind.subject][::every]
    columns = [(p, o, int(n)) for p in planes.split(",") for o in overlaps.split(",") for n in workers.split(",")]
    notes: dict[str, int] = {}
    count: Counter[str] = Counter()
    click.echo("| kind | " + " | ".join(f"{plane} {overlap} {number}" for plane, overlap, number in columns) + " |")
    click.echo("|---" * (1 + len(columns)) + "|")
    begin = time.monotonic()
    for kind in kinds:
        cells = [_cell(kind, *column, shards, notes, count) for column in columns]
        click.echo(f"| {kind.name} | " + " | ".join(cells) + " |")
        sys.stdout.flush()
    click.echo()
    for words, number in notes.items():
        click.echo(f"{number}. {words}")
    total = ", ".join(f"{number} {what}" for what, number in count.most_common())
    click.echo(f"\n{len(kinds)} kinds in {time.monotonic() - begin:.0f} s: {total}")


def _cell(
    kind: Kind, plane: str, overlap: str, num_workers: int, shards: int, notes: dict[str, int], count: Counter[str]
) -> str:
    if num_workers not in kind.workers:
        return ""
    try:
        found = compare(kind, plane, overlap, num_workers, shards=shards)
    except Exception as error:  # noqa: BLE001 - the other kinds are compared all the same
        found = f"{type(error).__name__}: {error}"
    outside = not kind.is_for(overlap)
    what = "equal" if found == "equal" else "refused" if found.startswith("refused") else "different"
    count[f"{what}, outside what the overlap is for" if outside else what] += 1
    mark = "=" if what == "equal" else f"{what[0].upper()}{notes.setdefault(found[:400], len(notes) + 1)}"
    return f"({mark})" if outside else mark


if __name__ == "__main__":
    main()
