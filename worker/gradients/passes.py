"""The backward passes that one push is the mean of, and their weights.

per_push = 3:   pass --add()--> pass --add()--> pass --add(): a push is due--> reset()
pass --add()--> cut_short(): a push is due with the passes that there are --> reset()
"""


class Passes:
    """Counts the passes of one model since its last push.

    Args:
        per_push: number of passes of a push, >= 1.

    Attributes:
        per_push: number of passes of a push.
        in_mean: number of passes of the coming push; fewer than ``per_push`` after ``cut_short``.
        count: number of passes since the last push, < ``per_push``.
        weight: weight of the pass under way in the mean, finite and >= 0.
    """

    def __init__(self, per_push: int = 1) -> None:
        self.per_push, self.weight = per_push, 1.0
        self.reset()

    def reset(self) -> None:
        """Begin a new push; the last one is done."""
        self.count, self.in_mean, self._earlier = 0, self.per_push, 0.0

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the passes since the last push, the one under way included."""
        return self._earlier + self.weight

    @property
    def last_is_next(self) -> bool:
        """Whether the next backward is the last one before a push."""
        return self.count == self.per_push - 1

    def add(self) -> bool:
        """Count one pass; returns whether a push is due, which ``total_weight`` is the weight of until ``reset``."""
        if self.last_is_next:
            self.count = 0
            return True
        self.count += 1
        self._earlier += self.weight
        return False

    def cut_short(self) -> int:
        """Make the passes that there are those of the coming push; returns their number, which may be 0."""
        passes, self.count = self.count, 0
        self.in_mean = passes or self.per_push
        return passes
