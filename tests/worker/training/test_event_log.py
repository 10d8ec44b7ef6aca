"""The file of JSON lines that a worker writes."""

import json
import math
from pathlib import Path

import pytest

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.worker.training.event_log import EventLog


def test_an_event_is_one_line_and_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "w0.jsonl"
    with EventLog(str(path)) as events:
        events.write("step", step=1, loss=0.5)
        assert path.read_text() == '{"event": "step", "step": 1, "loss": 0.5}\n'
        events.write("sample", text="two\nlines")
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["step", "sample"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    with EventLog(str(tmp_path / "e")) as events:
        events.write("evaluation", metrics={"loss": value, "accuracy": 1.0})
    assert json.loads((tmp_path / "e").read_text())["metrics"] == {"loss": None, "accuracy": 1.0}


def test_without_a_path_nothing_is_written() -> None:
    with EventLog() as events:
        events.write("step", step=1)


def test_a_path_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"events '.*file/e' cannot be written: "):
        EventLog(str(tmp_path / "file" / "e"))
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        EventLog(str(tmp_path))


def log_on_a_full_disk(error: Exception | None = None) -> None:
    with EventLog("/dev/full") as events:
        for step in range(3):
            events.write("step", step=step)
        if error is not None:
            raise error


def test_full_disk_ends_no_training_and_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PsError, match="events '/dev/full' cannot be written any more: No space left on device; the tr"):
        log_on_a_full_disk()
    assert caplog.text.count("training goes on, and later events are lost") == 1
    with pytest.raises(KeyError):
        log_on_a_full_disk(KeyError("of the training"))
