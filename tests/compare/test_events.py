"""Reading events: whole lines once, half lines later, wrong lines named."""

import json
import math
from pathlib import Path

import pytest

from tests.compare.synthetic import Job, write
from torch_ps.compare.events import End, Evaluation, EventError, Sample, Start, Tail, read_journals

SAMPLE = json.dumps({"event": "sample", "text": "abc"}) + "\n"


def test_each_line_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "w0.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text(SAMPLE)
    assert tail.read() == [Sample("abc")]
    assert tail.read() == []


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "w0.jsonl"
    tail = Tail(path)
    path.write_text(SAMPLE + SAMPLE[:10])
    assert tail.read() == [Sample("abc")]
    path.write_text(SAMPLE + SAMPLE)
    assert tail.read() == [Sample("abc")]


def test_unknown_events_and_fields_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "w0.jsonl"
    path.write_text('{"event": "weather", "time": 1}\n\n{"event": "sample", "text": "abc", "mood": 3}\n')
    assert Tail(path).read() == [Sample("abc")]


def test_a_loss_that_is_not_a_number_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "w0.jsonl"
    path.write_text('{"event": "evaluation", "time": 1, "job_samples": 8, "metrics": {"loss": NaN}}\n')
    (event,) = Tail(path).read()
    assert isinstance(event, Evaluation)
    assert math.isnan(event.metrics["loss"])


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("not json", "is not an event"),
        ("[1]", "is not an event"),
        ('{"event": "sample"}', "lacks 'text'"),
        ('{"event": "end", "time": Infinity}', "not a finite number"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "w0.jsonl"
    path.write_text(SAMPLE + line + "\n")
    with pytest.raises(EventError, match=f"w0.jsonl, line 2 .*{what}"):
        Tail(path).read()


def test_journals_come_in_rank_order(tmp_path: Path) -> None:
    write(Job(factors=(1.0,) * 11, samples=176), tmp_path)
    journals = read_journals(tmp_path)
    assert [journal.start.rank for journal in journals] == list(range(11))
    assert isinstance(journals[0].start, Start)
    assert isinstance(journals[0].end, End)
    assert journals[0].text is not None
    assert journals[10].samples == 16
