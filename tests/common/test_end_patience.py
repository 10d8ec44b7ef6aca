"""A process that was told to end has its time anew whenever it shows that it works."""

import time
from pathlib import Path

import pytest

from torch_ps.common.end_patience import Patience, show_work


def test_time_begins_anew_with_each_sign_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = 100.0, tmp_path / "ready"
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for there in (True, False):
        if there:
            file.touch()
        patience, silent = Patience(file, 10.0), Patience("", 10.0)
        for renewals in range(1, 4):
            now += 9.0
            if there:
                show_work(file)
            assert not there or not patience.over
            assert patience.renewals == (renewals if there else 0)
        assert silent.over
        now += 10.1
        assert patience.over
        file.unlink(missing_ok=True)
    show_work(file)  # says nothing, and makes nothing
    assert not file.exists()
