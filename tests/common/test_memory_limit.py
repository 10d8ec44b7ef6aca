"""The memory of a process, of made-up trees of control groups as kernels and containers show them."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from torch_ps.common.memory_limit import Memory, memory

GIB = 1 << 30
V1 = "cgroup rw,memory"
V2 = "cgroup2 rw,nsdelegate"


def machine(root: Path, groups: str, mounts: list[tuple[str, str, str]], files: Mapping[str, int | str]) -> Memory:
    """The memory in a machine of 8 GiB of which 6 are free; ``mounts`` are (root, mount point, kind)."""
    lines = "".join(f"31 23 0:28 {shown} {point} rw,nosuid shared:9 - {kind}\n" for shown, point, kind in mounts)
    lines = lines.replace("cgroup rw", "cgroup cgroup rw").replace("cgroup2 rw", "cgroup2 none rw")
    written = {
        "proc/meminfo": f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {6 << 20} kB\n",
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": "23 1 0:21 / / rw - ext4 /dev/sda rw\n" + lines,
        **{name: f"{value}\n" for name, value in files.items()},
    }
    for name, text in written.items():
        file = root / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return memory(root)


def group(folder: str, limit: int | str, usage: int = 0, cached: int = 0, *, v1: bool = False) -> dict[str, int | str]:
    limits, uses = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    total = "total_" if v1 else ""
    stat = f"anon 1\n{total}inactive_file {cached}\n{total}active_file 0"
    return {f"{folder}/{limits}": limit, f"{folder}/{uses}": usage, f"{folder}/memory.stat": stat}


def test_without_groups_it_is_that_of_the_machine(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n", [("/", "/cg", V2)], {}) == Memory(8 * GIB, 6 * GIB, "this machine")


def test_without_proc_it_is_that_of_the_machine_as_python_knows_it(tmp_path: Path) -> None:
    total = memory(tmp_path).limit
    assert total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 10 << 10


def test_mount_point_with_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    machine(tmp_path, "0::/\n", [("/", "/cg", V2)], group("/cg", 2 * GIB))
    mounts = tmp_path / "proc/self/mountinfo"
    mounts.write_bytes(b"24 1 0:21 / /\xff rw - ext4 /dev/sdb rw\n" + mounts.read_bytes())
    assert memory(tmp_path).limit == 2 * GIB


def test_container_of_version_2_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    found = machine(tmp_path, "0::/\n", [("/", "/cg", V2)], group("/cg", 2 * GIB, GIB, GIB // 4))
    assert found == Memory(2 * GIB, GIB + GIB // 4, f"the control group {tmp_path}/cg")


def test_smallest_limit_of_all_groups_above_counts_and_the_least_that_is_free(tmp_path: Path) -> None:
    files = group("/cg/a", 3 * GIB, 3 * GIB - 5) | group("/cg/a/b", 2 * GIB, GIB) | group("/cg/a/b/c", "max", GIB)
    found = machine(tmp_path, "0::/a/b/c\n", [("/", "/cg", V2)], files)
    assert found == Memory(2 * GIB, 5, f"the control group {tmp_path}/cg/a/b")


@pytest.mark.parametrize("shown", ["/", "/docker/x"])
def test_version_1_beside_version_2_and_with_a_mount_of_a_part(shown: str, tmp_path: Path) -> None:
    below = "/docker/x" if shown == "/" else ""
    groups = "9:name=systemd:/\n5:cpu,memory:/docker/x\n4:cpuset:/y\n0::/\n"
    mounts = [(shown, "/cg/memory", V1), ("/", "/cg/unified", V2), ("/", "/cg/cpu", "cgroup rw,cpu")]
    files = group("/cg/memory", 1 << 62, v1=True) | group(f"/cg/memory{below}", GIB, GIB // 2, GIB // 4, v1=True)
    found = machine(tmp_path, groups, mounts, files)
    assert found == Memory(GIB, GIB - GIB // 4, f"the control group {tmp_path}/cg/memory{below}")


def test_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n", [("/", "/cg", V2)], group("/cg", GIB, 2 * GIB)).free == 0


def test_this_machine_has_some() -> None:
    found = memory()
    assert 0 < found.free <= found.limit
