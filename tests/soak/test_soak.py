"""A minute of ``make soak``, and that it would find a leak."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.soak.run import Found, Reading, check, soak, table

#: Percent by which resident memory may grow: pages that a young server touches for the first time are no leak.
YOUNG = 10.0


@pytest.mark.tier("all")
@pytest.mark.timeout(600)
def test_servers_of_workers_that_die_and_join_for_a_minute_hold_on_to_nothing() -> None:
    found = soak(45.0, 15.0, pause=0.2, window=6)
    check(found, most_growth=YOUNG)
    assert found.num_deaths >= 11
    assert found.version > 0
    assert f"{found.num_deaths} of them killed" in table(found)

    def with_leak(leak: Callable[[Reading], Reading]) -> Found:
        return replace(found, readings=[[leak(reading) for reading in each] for each in found.readings])

    with pytest.raises(AssertionError, match=r"shard 0 grew from .* MiB"):
        check(with_leak(lambda r: replace(r, own=r.own + r.deaths)), most_growth=YOUNG)  # a MiB per worker
    with pytest.raises(AssertionError, match="files open"):
        check(with_leak(lambda r: replace(r, files=r.files + r.deaths)), most_growth=YOUNG)
    with pytest.raises(AssertionError, match="threads"):
        check(with_leak(lambda r: replace(r, threads=r.threads + r.deaths)), most_growth=YOUNG)
