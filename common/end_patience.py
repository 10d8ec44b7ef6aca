"""How long a process that was told to end is waited for: some seconds, anew whenever it says that it still works.

    it:     show_work(file), every second or so
    others: Patience(file, seconds).over

Servers say so with the ready file that their parent has given them, while they write the last checkpoint.
"""

import contextlib
import os
import time


def show_work(file: str | os.PathLike[str]) -> None:
    """Say that this process still works, by the time of ``file``; one that does not exist says nothing."""
    with contextlib.suppress(OSError):
        os.utime(file)


class Patience:
    """Time that a process has to end.

    Args:
        file: file with which the process says that it works.
        seconds: time that it has, from now on and from each time that it says so.

    Attributes:
        renewals: number of times that it has said so, as far as ``over`` has seen.
    """

    def __init__(self, file: str | os.PathLike[str], seconds: float) -> None:
        self._file, self._seconds = file, seconds
        self._shown, self._end = _time_of(file), time.monotonic() + seconds
        self.renewals = 0

    @property
    def over(self) -> bool:
        """Whether the process has had its time."""
        if (shown := _time_of(self._file)) != self._shown:
            self._shown, self._end = shown, time.monotonic() + self._seconds
            self.renewals += 1
        return time.monotonic() > self._end


def _time_of(file: str | os.PathLike[str]) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0
