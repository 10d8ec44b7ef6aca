"""Floods of strangers, each for a moment: the server does not grow, and a worker goes on with the right numbers.

``make hostile`` runs them for longer, and looks at the time that a push takes too.
"""

from collections.abc import Iterator

import pytest

from tests.hostile.floods import FLOODS
from tests.hostile.run import MOST_FILES, MOST_MIB, MOST_THREADS, Target, target, withstand

pytestmark = pytest.mark.tier("all")
SECONDS = 0.7


@pytest.fixture(scope="module")
def plain() -> Iterator[Target]:
    with target(tls=False) as job:
        yield job


@pytest.fixture(scope="module")
def secured() -> Iterator[Target]:
    with target(tls=True) as job:
        yield job


def check(job: Target, name: str) -> None:
    cost = withstand(job, name, SECONDS)
    assert cost.mib[1] < MOST_MIB
    assert cost.files[1] - cost.files[0] < MOST_FILES
    assert cost.threads[1] - cost.threads[0] < MOST_THREADS


@pytest.mark.parametrize("name", FLOODS)
def test_flood_costs_no_memory_files_or_threads(plain: Target, name: str) -> None:
    check(plain, name)


@pytest.mark.parametrize("name", ["ping", "continuation", "wrong token", "unfinished handshakes"])
def test_flood_over_tls_costs_no_memory_files_or_threads(secured: Target, name: str) -> None:
    check(secured, name)
