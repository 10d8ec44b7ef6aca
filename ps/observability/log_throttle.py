"""Bounds how often one kind of line is logged, so that a peer who repeats a mistake does not fill the disk."""


class LogThrottle:
    """Admits at most ``lines`` log lines in every ``seconds`` and counts those it holds back. Has no clock."""

    def __init__(self, lines: int = 10, seconds: float = 10.0) -> None:
        self._lines, self._seconds = lines, seconds
        self._begin, self._admitted, self._held_back = float("-inf"), 0, 0

    def admit(self, now: float) -> int | None:
        """Decide about one line, at ``now`` in seconds.

        Returns:
            None: do not log it. Else the number of lines held back since the last one that was admitted.
        """
        if now - self._begin >= self._seconds:
            self._begin, self._admitted = now, 0
        if self._admitted == self._lines:
            self._held_back += 1
            return None
        self._admitted += 1
        held_back, self._held_back = self._held_back, 0
        return held_back
