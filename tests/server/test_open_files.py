"""How many files a server may have open: as many as the system allows, and enough for its workers, or a refusal."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def limited(soft: int, hard: int, num_workers: int) -> subprocess.CompletedProcess[str]:
    """What ``allow_open_files`` says and makes of these limits, in a process of its own."""
    code = (
        "import resource; from torch_ps.ps.server.open_files import allow_open_files\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"allow_open_files({num_workers}); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_limit_is_raised_to_what_the_system_allows() -> None:
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
    assert limited(256, hard, 256).stdout == f"{hard}\n"


def test_too_few_for_the_workers_are_refused_in_words() -> None:
    said = limited(20, 64, 4).stderr
    assert (
        "this process may open 64 files, and a server of 4 workers needs 72; raise the limit, with ulimit -n 72" in said
    )
