"""Whether gradients travel ahead of ``step``: tried both ways, and the faster one kept for a while.

    trial: blocks of steps ahead, at step, ahead, at step --medians of the time per step--> the faster way, KEPT steps

Sending during backward takes the send out of the step, and costs backward time where cores are few. On a link that is
as fast both ways it gains little, since at ``step`` gradients go up while parameters come down, and it can cost the
time that a push waits behind gradients in the buffers of the network. Neither end knows the link, so it is measured.
What waits in those buffers at the end of a step delays the next one, so a way shows its speed only in steps in a row.
The bits are the same either way.
"""

import statistics

#: Steps in a row of one way, and how many of them do not count, as the change itself disturbs them.
BLOCK, UNCOUNTED = 6, 2
#: Steps of one trial: each way has two blocks, so that a change of the machine meanwhile decides nothing.
TRIAL = 4 * BLOCK
#: Steps from one trial to the next, doubled each time that the outcome is the same, and the most of them.
KEPT, MOST_KEPT = 100, 1600
#: Share of the time per step that sending ahead has to save to be worth its memory and its second comparison.
GAIN = 0.03


class AheadChoice:
    """The choice of one worker.

    Attributes:
        ahead: whether the gradients of the present step leave during backward.
    """

    def __init__(self) -> None:
        self.ahead = True
        self._left = TRIAL  # steps left of the trial, the present one included; 0: no trial
        self._kept, self._rest = KEPT // 2, 0
        self._found: bool | None = None
        self._since: float | None = None
        self._periods: dict[bool, list[float]] = {True: [], False: []}

    def begin(self, now: float) -> None:
        """Note the first gradient of a step, which ends the time of the step before.

        Args:
            now: seconds on a monotonic clock.
        """
        since, self._since = self._since, now
        if since is None:
            return
        if self._left:
            if (TRIAL - self._left) % BLOCK >= UNCOUNTED:
                self._periods[self.ahead].append(now - since)
            self._left -= 1
            if not self._left:
                self._decide()
            elif self._left % BLOCK == 0:
                self.ahead = not self.ahead
        else:
            self._rest -= 1
            if not self._rest:
                self._left, self.ahead = TRIAL, True

    def end(self, used: int, sent: int) -> bool:
        """Note what a step could use. Sending ahead what changes afterwards is never the faster way.

        Args:
            used: bytes of gradients that were sent ahead and applied.
            sent: bytes of gradients that were sent ahead.

        Returns:
            Whether a trial has ended because most of it changed.
        """
        if 2 * used >= sent:
            return False
        self._settle(False)
        return True

    def _decide(self) -> None:
        ahead, at_step = (statistics.median(self._periods[way]) for way in (True, False))
        self._settle(ahead < (1 - GAIN) * at_step)

    def _settle(self, ahead: bool) -> None:
        self._kept = min(2 * self._kept, MOST_KEPT) if self._found in (None, ahead) else KEPT
        self.ahead = self._found = ahead
        self._left, self._rest = 0, self._kept
        self._periods = {True: [], False: []}
