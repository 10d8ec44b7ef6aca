"""Error feedback for pulls: both sides keep the same copy of the parameters, so lossy pulls do not drift.

    server:  sends C(parameters - copy), then  copy += decoded       worker:  copy += decoded, and that is its model

Both sides add the same bits, so the copies stay equal, and the difference that the next pull sends contains what this
one left out. The first pull of a stream is sent whole. A restored server has the copies that workers had before the
restart: a worker that starts anew is sent its copy, so that it continues as without the restart. A standby follows the
copies one answer behind, as the last answer may not have arrived.

Memory: one fp32 copy of the parameters on each side, for every worker that pulls with a coarse codec; the server frees
its copy when the worker's stream ends.

Source: Tang et al., ICML 2019, arXiv:1905.05957 (DoubleSqueeze), for error feedback on the way down.
"""

from collections.abc import Collection, Mapping

import torch

from torch_ps.common.codecs.registry import Codec
from torch_ps.common.wire.frames import Buffer


class Copies:
    """The copies of one worker by bucket. Calls for one bucket never overlap; calls for different buckets may.

    Args:
        restored: copies by bucket, shape (numel,), fp32, that the other side has lost.
    """

    def __init__(self, restored: Mapping[int, torch.Tensor] | None = None) -> None:
        self._of: dict[int, torch.Tensor] = dict(restored or {})
        self._lost = set(self._of)
        self._pending: dict[int, tuple[Codec, int]] = {}  # on a standby: codec and seed of the last answer

    def get(self, bucket: int) -> torch.Tensor | None:
        """The other side's copy of one bucket, shape (numel,); None before its first pull."""
        return self._of.get(bucket)

    def encode(self, bucket: int, values: torch.Tensor, codec: Codec, seed: int) -> tuple[Buffer, ...] | None:
        """Encode the difference of ``values`` and the copy, and update the copy. None: send ``values`` whole."""
        self._pending.pop(bucket, None)
        copy = self._of.get(bucket)
        if copy is None:
            self._of[bucket] = values.clone()
            return None
        lacks = values - copy
        if not lacks.sum().isfinite() and not lacks.isfinite().all():
            copy.copy_(values)  # a model that has diverged is sent whole
            self._lost.discard(bucket)
            return None
        payload = memoryview(b"".join(codec.encode(lacks, seed)))
        copy.add_(codec.decode(payload, lacks))
        return (payload,)

    def forget(self, bucket: int) -> None:
        """Drop the copy of one bucket, so that the next answer carries its values whole."""
        self._of.pop(bucket, None)
        self._pending.pop(bucket, None)
        self._lost.discard(bucket)

    def lost(self, bucket: int) -> torch.Tensor | None:
        """After ``encode``: the copy, to be sent whole, if the other side has lost it; the next call returns None."""
        if bucket not in self._lost:
            return None
        self._lost.remove(bucket)
        return self._of[bucket]

    def lose(self, bucket: int, copy: torch.Tensor) -> None:
        """On a standby: record that the other side has ``copy`` and needs it whole after a takeover."""
        self._of[bucket] = copy
        self._lost.add(bucket)

    def pend(self, bucket: int, codec: Codec, seed: int, *, whole: bool) -> None:
        """On a standby: record an answer that the primary encodes now and that may or may not arrive.

        Args:
            bucket: number of the bucket.
            codec: codec of the answer.
            seed: seed of the answer.
            whole: True if the answer carries the values whole.
        """
        self._pending[bucket] = codec, seed
        if whole:
            self._of.pop(bucket, None)

    def settle(self, bucket: int, values: torch.Tensor) -> None:
        """Before ``values`` change: apply a pending answer, which the other side has, or it will get the copy whole."""
        if bucket in self._pending:
            codec, seed = self._pending[bucket]
            self.encode(bucket, values, codec, seed)
            self._lost.add(bucket)

    @property
    def pending(self) -> Collection[int]:
        """Buckets with a pending answer; call ``settle`` for each before it changes."""
        return tuple(self._pending)

    def take(self, bucket: int, decoded: torch.Tensor, *, delta: bool) -> torch.Tensor:
        """Worker: add ``decoded`` to the copy, or replace the copy by it unless ``delta``; returns the copy."""
        copy = self._of.get(bucket)
        if copy is None or not delta:
            self._of[bucket] = copy = decoded.clone()
        else:
            copy.add_(decoded)
        return copy
