"""Memory that this process may use: that of the machine, or less where a container's control group limits it.

    /proc/self/cgroup       the group of this process, in version 2 and in the memory hierarchy of version 1
    /proc/self/mountinfo    where these hierarchies are mounted, and which part of them
    the group and all groups above it, as far as they can be seen: limit, usage

Rules of this file
  1. The kernel ends a process of the group whose usage cannot stay below its limit, so the smallest limit counts, and
     the group with the least left. Cached pages of files count as free: the kernel drops them first.
  2. What cannot be read limits nothing; what the machine has always does.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory: the ``limit``, and how many of them are ``free``; ``place`` names what limits."""

    limit: int
    free: int
    place: str


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of files of a group: limit, usage, and the fields of memory.stat for cached pages of files."""

    limit: str
    usage: str
    cached: tuple[str, str]


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Version("memory.max", "memory.current", ("inactive_file", "active_file"))


def memory(root: Path = Path("/")) -> Memory:
    """The memory of this process: the smallest limit, and the least that is free under any of them.

    Args:
        root: Folder that holds ``proc`` and the mount points.
    """
    found = [_machine(root), *_groups(root)]
    smallest = min(found, key=lambda each: each.limit)
    return Memory(smallest.limit, max(min(each.free for each in found), 0), smallest.place)


def _machine(root: Path) -> Memory:
    kilobytes = _numbers(root / "proc/meminfo")
    total = kilobytes.get("MemTotal", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 10)
    return Memory(1024 * total, 1024 * kilobytes.get("MemAvailable", total), "this machine")


def _groups(root: Path) -> Iterator[Memory]:
    """Every group with a limit that this process is in."""
    for version, folder, top in _folders(root):
        for each in (folder, *folder.parents):
            limit = _number(each / version.limit)
            if limit is not None:
                usage, stat = _number(each / version.usage) or 0, _numbers(each / "memory.stat")
                used = max(usage - sum(stat.get(name, 0) for name in version.cached), 0)
                yield Memory(limit, limit - used, f"the control group {each}")
            if each == top:
                break


def _folders(root: Path) -> Iterator[tuple[_Version, Path, Path]]:
    """The group of this process, and the highest one that can be seen, for each version."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
        mounts = [line.split() for line in os.fsdecode((root / "proc/self/mountinfo").read_bytes()).split("\n") if line]
    except OSError:
        return
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        version = _V2 if kind == "cgroup2" else _V1 if kind == "cgroup" and "memory" in options else None
        if version is None:
            continue
        shown, top = Path(fields[3]), root / fields[4].lstrip("/")
        for number, controllers, path in groups:
            if (number == "0" and version is _V2) or (version is _V1 and "memory" in controllers.split(",")):
                below = Path(path).relative_to(shown) if Path(path).is_relative_to(shown) else Path()
                yield version, top / below, top


def _number(file: Path) -> int | None:
    """The number in a file; None if it says "max" or cannot be read."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _numbers(file: Path) -> dict[str, int]:
    """Lines "name value" or "name: value kB" of a file."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
