"""What the workers were told and what the servers hold, compared: nothing acknowledged is lost, nothing is doubled.

    acknowledged steps of all workers --read--> required samples --check--> parameters that were pulled after that
    servers go on from version V -------went_back--> required: those acknowledged at a version <= V

``x[i]`` is 0 until sample i is trained on. In async mode each push takes exactly 1 off; in sync mode the step of T
samples takes 1/T off each of them, so ``-1/x[i]`` is a whole number, at most what all workers together have in a step.
``late`` is in the last bucket, so on the last shard, and gets as much as all ``x[i]`` together.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

#: Of ``1 / x`` from a whole number: fp32 has 24 bits.
ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Ack:
    """One acknowledged step: when it was begun, and the version of its first bucket in the answer."""

    began: float
    version: int
    samples: tuple[int, ...]


@dataclass
class Ledger:
    """``files``: of each worker, one line per acknowledged step, as ``tests.chaos.worker`` writes them."""

    files: list[Path]
    size: int
    most: int  # samples in one step of all workers; 1 in async mode
    required: dict[int, int] = field(default_factory=dict)  # sample -> lowest version at which it was acknowledged
    num_acks: int = 0
    num_taken_back: int = 0
    _read: dict[Path, int] = field(default_factory=dict)
    _back: list[tuple[float, int]] = field(default_factory=list)  # when servers were killed, where they went on

    def read(self) -> set[Path]:
        """Take up new lines; gives the files that had any."""
        news = set()
        for path in self.files:
            data = path.read_bytes() if path.exists() else b""
            end = data.rfind(b"\n") + 1
            for line in data[self._read.get(path, 0) : end].splitlines():
                began, version, samples = json.loads(line)
                self._take(Ack(began, version, tuple(samples)))
                news.add(path)
            self._read[path] = end
        return news

    def went_back(self, killed: float, version: int) -> None:
        """All servers were dead ``killed`` seconds on the monotonic clock and go on from ``version``."""
        self._back.append((killed, version))
        before = len(self.required)
        self.required = {sample: at for sample, at in self.required.items() if at <= version}
        self.num_taken_back += before - len(self.required)

    def _take(self, ack: Ack) -> None:
        self.num_acks += 1
        if all(ack.began > killed or ack.version <= version for killed, version in self._back):
            for sample in ack.samples:
                self.required[sample] = min(ack.version, self.required.get(sample, ack.version))

    def check(self, x: torch.Tensor) -> None:
        """Compare with parameters that were pulled after the last ``read``. Raises AssertionError with the samples."""
        x = x[: self.size].double()
        lost = [sample for sample in self.required if not x[sample]]
        assert not lost, f"{len(lost)} acknowledged samples are lost: {sorted(lost)[:10]}"
        inverse = -1 / x[x != 0]
        whole = inverse.round()
        wrong = (inverse - whole).abs() > ROUNDING * whole.abs()
        wrong |= (whole < 1) | (whole > self.most)
        assert not wrong.any(), f"{int(wrong.sum())} samples are not trained on once: x is {(-1 / inverse[wrong])[:10]}"

    def check_end(self, x: torch.Tensor, late: float, absorbed: float, slack: float) -> None:
        """After the last sample. ``absorbed``: what the servers have counted; ``slack``: of ``late``, in its units."""
        self.check(x)
        missing = (x[: self.size] == 0).nonzero().flatten().tolist()
        assert not missing, f"{len(missing)} samples were never trained on: {missing[:10]}"
        assert absorbed == self.size, f"the servers have counted {absorbed:g} samples in place of {self.size}"
        assert not x[self.size :].any(), "parameters that no sample has were changed"
        gap = abs(x.double().sum().item() - late)
        assert gap <= slack + ROUNDING * self.size, f"first and last bucket differ by {gap:g}, more than {slack:g}"


def now() -> float:
    """Time in seconds on the clock that all processes of this machine share."""
    return time.monotonic()
