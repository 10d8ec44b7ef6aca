"""Draw docs/state-machines.md and its pictures from the tables of ``ps/core/state_tables.py``.

    python scripts/state_diagrams.py            # write what has changed
    python scripts/state_diagrams.py --check    # only say what would; exit status 1 if anything would

States stand in a column. An arrow on the right leads down, one on the left leads up, each with its calls.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from torch_ps.ps.core.state_tables import TABLES, StateTable

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT, GAP, TEXT = 150, 34, 46, 6.6  # of a box, between boxes, of a letter; in pixels

HEAD = """# State machines

<!-- Written by scripts/state_diagrams.py from ps/core/state_tables.py; a test fails when they differ. -->

The states of a worker, a push, a sample, a checkpoint and a server, and the calls of the core that lead from one state
to another. The tables are complete: a test explores the machines of `ps/core/` and compares every change of state with
them. The docstring of `torch_ps.ps.core` says who makes the calls, and when.
"""


def arrows(table: StateTable) -> dict[tuple[str, str], list[str]]:
    """Calls by the pair of states that they lead between, in the order of the states."""
    order = list(table.states)
    found: dict[tuple[str, str], list[str]] = {}
    for before, call, after in sorted(table.rows, key=lambda row: (order.index(row[0]), order.index(row[2]), row[1])):
        found.setdefault((before, after), []).append(call)
    return found


def lanes(spans: list[tuple[int, int]]) -> list[int]:
    """A lane for each arrow, counted from the boxes: short arrows inside, and no two of a lane beside each other."""
    taken: list[list[tuple[int, int]]] = []
    lane_of = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: abs(spans[i][1] - spans[i][0])):
        low, high = sorted(spans[i])
        free = (n for n, lane in enumerate(taken) if all(high <= a or b <= low for a, b in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        lane_of[i] = lane
    return lane_of


def svg(table: StateTable) -> str:
    """The picture of one table."""
    order = list(table.states)
    pairs = [(order.index(before), order.index(after), calls) for (before, after), calls in arrows(table).items()]
    parts, reach = list[tuple[str, str]](), dict[int, float]()
    for side in (1, -1):
        here = [pair for pair in pairs if (pair[1] - pair[0]) * side > 0]
        lane_of = lanes([(a, b) for a, b, _ in here])
        where, x = dict[int, float](), 18.0  # of each lane, and how far this side reaches
        for lane in range(max(lane_of, default=-1) + 1):
            texts = [call for (_, _, calls), of in zip(here, lane_of, strict=True) if of == lane for call in calls]
            where[lane], x = x, x + max(map(len, texts)) * TEXT + 18
        reach[side] = x
        starts, ends = _ports(here, lane_of)
        for i, (_, _, calls) in enumerate(here):
            parts.append(_arrow(side, where[lane_of[i]], starts[i], ends[i], calls))
    width, height = reach[-1] + WIDTH + reach[1] + 16, len(order) * (HEIGHT + GAP) - GAP + 24
    frame = f'x="{-reach[-1] - 8:.0f}" y="-12" width="{width:.0f}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-reach[-1] - 8:.0f} -12 {width:.0f} {height}" '
            f'width="{width:.0f}" height="{height}" font-family="sans-serif" font-size="12">',
            f"<title>{escape(table.title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>',
            f'<rect {frame} fill="white"/>',
            *(part[0] for part in parts),
            *(part[1] for part in parts),
            *(_box(i, state) for i, state in enumerate(order)),
            "</svg>",
            "",
        ]
    )


def _ports(pairs: list[tuple[int, int, list[str]]], lane_of: list[int]) -> tuple[list[float], list[float]]:
    """Where each arrow of a side leaves and enters, so that no two touch a box at the same height."""
    starts, ends = [0.0] * len(pairs), [0.0] * len(pairs)
    for box in {i for a, b, _ in pairs for i in (a, b)}:
        touching = [i for i, (a, b, _) in enumerate(pairs) if box in (a, b)]
        up = {i for i in touching if box == max(pairs[i][:2])}
        # Arrows to boxes above stand in the upper half; there and below, inner lanes are nearest to their other end.
        touching.sort(key=lambda i: (i not in up, lane_of[i] if i in up else -lane_of[i]))
        for place, i in enumerate(touching):
            y = box * (HEIGHT + GAP) + HEIGHT * (place + 1) / (len(touching) + 1)
            if pairs[i][0] == box:
                starts[i] = y
            else:
                ends[i] = y
    return starts, ends


def _box(i: int, state: str) -> str:
    y = i * (HEIGHT + GAP)
    return (
        f'<rect x="0" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#e8eaf6" stroke="#3f51b5"/>'
        f'<text x="{WIDTH / 2:.0f}" y="{y + 21}" text-anchor="middle" fill="#111">{escape(state)}</text>'
    )


def _arrow(side: int, out: float, y0: float, y1: float, calls: list[str]) -> tuple[str, str]:
    edge = WIDTH if side > 0 else 0
    x, anchor = edge + side * out, "start" if side > 0 else "end"
    line = (
        f'<path d="M{edge} {y0:.1f} H{x - side * 6:.1f} Q{x:.1f} {y0:.1f} {x:.1f} {y0 + side * 6:.1f} '
        f'V{y1 - side * 6:.1f} Q{x:.1f} {y1:.1f} {x - side * 6:.1f} {y1:.1f} H{edge + side}" '
        'fill="none" stroke="#555" marker-end="url(#head)"/>'
    )
    top = (y0 + y1) / 2 + 4 - 7 * (len(calls) - 1)
    texts = (
        f'<text x="{x + side * 5:.1f}" y="{top + 14 * i:.1f}" text-anchor="{anchor}" fill="#111" stroke="white" '
        f'stroke-width="4" paint-order="stroke">{escape(call)}</text>'
        for i, call in enumerate(calls)
    )
    return line, "".join(texts)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for table in TABLES:
        parts.append(f"## {table.title}\n\n{table.about.replace('``', '`')} The machine: `{table.where}`.\n")
        parts.append(f"![{table.title}: states and calls](images/{picture(table)})\n")
        parts.append("| state | meaning |\n|---|---|")
        parts.append("\n".join(f"| {state} | {meaning} |" for state, meaning in table.states.items()) + "\n")
        parts.append("| from | call | to |\n|---|---|---|")
        rows = ((a, ", ".join(f"`{c}`" for c in calls), b) for (a, b), calls in arrows(table).items())
        parts.append("\n".join(f"| {a} | {calls} | {b} |" for a, calls, b in rows) + "\n")
    return "\n".join(parts).rstrip("\n") + "\n"


def picture(table: StateTable) -> str:
    return f"states-{Path(table.where).stem.replace('_', '-')}.svg"


def drawn() -> dict[Path, str]:
    """Every file that is drawn, with its text."""
    return {DOCS / "state-machines.md": page(), **{DOCS / "images" / picture(table): svg(table) for table in TABLES}}


def main() -> int:
    old = [path for path, text in drawn().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in old:
        sys.stdout.write(f"{path.relative_to(DOCS.parent)} is not what the tables give\n")
        if "--check" not in sys.argv:
            path.write_text(drawn()[path], encoding="utf-8")
    return 1 if old and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
