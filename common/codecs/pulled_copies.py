"""What the other side's copy of the parameters holds: lossy pulls that do not drift.

    server:  sends C(parameters - copy), then  copy += decoded       worker:  copy += decoded, and that is its model

Both sides add the same bits, so the copies stay equal, and what one pull left out is in the difference that the next
one sends. The first pull of a stream is sent whole. A restored server knows copies that workers had before the restart:
those who begin anew are sent what they would have, so that they go on as if nothing had happened. A standby follows
the copies one answer behind, for the last answer may not have arrived.

Memory: one fp32 copy of the parameters on each side, for every worker that pulls with a coarse codec; the server frees
its copy when the worker's stream ends.

Source: Tang et al., ICML 2019, arXiv:1905.05957 (DoubleSqueeze), for error feedback on the way down.
"""

from collections.abc import Collection, Mapping

import torch

from torch_ps.common.codecs.registry import Codec
from torch_ps.common.wire.frames import Buffer


class Copies:
    """By number of the bucket. Calls for one bucket never overlap; calls for different buckets may.

    Args:
        restored: copies, shape (numel,), fp32, that the other side has lost.
    """

    def __init__(self, restored: Mapping[int, torch.Tensor] | None = None) -> None:
        self._of: dict[int, torch.Tensor] = dict(restored or {})
        self._lost = set(self._of)
        self._pending: dict[int, tuple[Codec, int]] = {}  # on a standby: codec and seed of the last answer

    def get(self, bucket: int) -> torch.Tensor | None:
        """What the other side has of one bucket, shape (numel,); None before its first pull."""
        return self._of.get(bucket)

    def encode(self, bucket: int, values: torch.Tensor, codec: Codec, seed: int) -> tuple[Buffer, ...] | None:
        """What the other side lacks of ``values``, and the copy follows; None: it needs them whole."""
        self._pending.pop(bucket, None)
        copy = self._of.get(bucket)
        if copy is None:
            self._of[bucket] = values.clone()
            return None
        lacks = values - copy
        if not lacks.sum().isfinite() and not lacks.isfinite().all():
            copy.copy_(values)  # a model that has diverged: it is sent as it is
            self._lost.discard(bucket)
            return None
        payload = memoryview(b"".join(codec.encode(lacks, seed)))
        copy.add_(codec.decode(payload, lacks))
        return (payload,)

    def lost(self, bucket: int) -> torch.Tensor | None:
        """After ``encode``: the copy, if the other side has lost it and needs it whole; asked once, it has it again."""
        if bucket not in self._lost:
            return None
        self._lost.remove(bucket)
        return self._of[bucket]

    def lose(self, bucket: int, copy: torch.Tensor) -> None:
        """On a standby: the other side has ``copy``, and will need it whole from here."""
        self._of[bucket] = copy
        self._lost.add(bucket)

    def pend(self, bucket: int, codec: Codec, seed: int, *, whole: bool) -> None:
        """On a standby: the other side is answered with what ``encode`` gives now, or it never gets that answer.

        Args:
            whole: there was no copy.
        """
        self._pending[bucket] = codec, seed
        if whole:
            self._of.pop(bucket, None)

    def settle(self, bucket: int, values: torch.Tensor) -> None:
        """Before ``values`` change: if an answer is pending, the other side has it by now, or will get all anew."""
        if bucket in self._pending:
            codec, seed = self._pending[bucket]
            self.encode(bucket, values, codec, seed)
            self._lost.add(bucket)

    @property
    def pending(self) -> Collection[int]:
        """Buckets that ``settle`` has to be called for."""
        return tuple(self._pending)

    def take(self, bucket: int, decoded: torch.Tensor, *, delta: bool) -> torch.Tensor:
        """The values after what has come: ``decoded`` added, or whole in the place of all there was."""
        copy = self._of.get(bucket)
        if copy is None or not delta:
            self._of[bucket] = copy = decoded.clone()
        else:
            copy.add_(decoded)
        return copy
