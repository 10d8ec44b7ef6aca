"""Error feedback: what a lossy push left out is kept and added to the next one.

    sent = C(gradient + residual)        residual = gradient + residual - decoded(sent)

So the sum of what was applied and what is kept is the sum of all gradients, whatever the codec does to each of them. A
biased codec converges with it and may not without.

Memory: one fp32 copy of the parameters per worker, made at the first push.

Source: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv:1901.09847.
"""

import torch


class Residuals:
    """Residuals of one worker, by number of the bucket."""

    def __init__(self) -> None:
        self._of: dict[int, torch.Tensor] = {}

    def add_to(self, bucket: int, values: torch.Tensor) -> None:
        """Add what is kept to ``values``, in place."""
        if bucket in self._of:
            values.add_(self._of[bucket])

    def keep(self, bucket: int, sent: torch.Tensor, decoded: torch.Tensor) -> None:
        """Keep what ``decoded`` lacks of ``sent``."""
        if bucket not in self._of:
            self._of[bucket] = torch.empty_like(sent)
        torch.sub(sent, decoded, out=self._of[bucket])

    def put_back(self, bucket: int, decoded: torch.Tensor) -> None:
        """A push came too late to count: all of it is left out after all."""
        if bucket in self._of:
            self._of[bucket].add_(decoded)

    def get(self, bucket: int) -> torch.Tensor | None:
        """What is kept, shape (numel,); None if nothing ever was."""
        return self._of.get(bucket)
