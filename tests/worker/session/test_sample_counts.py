"""Counts of samples go on where the lead does, and begin anew where it has begun anew."""

from torch_ps.worker.session.sample_counts import SampleCounts

KEY = b"a data set"


def read_epoch(counts: SampleCounts, number: int, samples: int) -> list[tuple[int, int]]:
    """Samples that the push after an epoch names as covered."""
    counts.add_received(KEY, number, samples)
    counts.start(KEY, samples)
    return [(each.number, each.samples) for each in counts.cover()]


def test_epoch_after_the_last_one_asked_for_goes_on_where_the_lead_has_the_data_set_still() -> None:
    counts = SampleCounts()
    assert read_epoch(counts, 3, 48) == [(3, 48)]
    counts.finish(KEY)
    assert counts.cover() == []
    assert (counts.number(KEY), counts.received(KEY)) == (3, 48)
    assert read_epoch(counts, 3, 48) == [(3, 96)]


def test_counts_begin_anew_with_a_new_number_and_in_a_new_session() -> None:
    counts = SampleCounts()
    read_epoch(counts, 3, 48)
    counts.finish(KEY)
    assert read_epoch(counts, 4, 8) == [(4, 8)]
    counts.finish(KEY)
    counts.clear()
    assert counts.received(KEY) == 0


def test_data_set_with_samples_that_no_push_has_covered_is_not_put_aside() -> None:
    counts = SampleCounts()
    counts.add_received(KEY, 0, 8)
    counts.start(KEY, 8)
    counts.finish(KEY)
    assert [(each.number, each.samples) for each in counts.cover()] == [(0, 8)]
