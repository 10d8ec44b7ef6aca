"""From a bucket's gradient to what is pushed: codec of the step, error feedback, momentum correction.

    gradient --momentum--> + residual --codec--> payload
                               ^                    |
                               +-- what it lacks <--+

Rules of this file
  1. A gradient that is not finite travels as fp16, so that the server sees, counts and names it; the residual stays.
  2. A gradient of weight 0 leaves the residual alone: nothing of it will be applied.
  3. A push that was dropped as late goes back into the residual. A repeat is the same bytes and changes nothing here.

Source: see ``feedback`` and ``dgc``.
"""

import hashlib
from collections.abc import Mapping

import torch

from torch_ps.common import codecs
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.on_gpu import DeviceCodec, on_device
from torch_ps.common.errors import ConfigError
from torch_ps.common.optimizer_spec import HyperValue
from torch_ps.common.plan import Bucket
from torch_ps.common.wire.frames import Buffer
from torch_ps.worker.gradients import momentum_correction as dgc
from torch_ps.worker.gradients.feedback import Residuals
from torch_ps.worker.gradients.flat_tensors import empty_fp32
from torch_ps.worker.gradients.momentum_correction import MomentumCorrection


class Compressor:
    """The way of one worker's gradients.

    Args:
        compress: codec of gradients.
        feedback: "auto" keeps the residual of biased codecs, "on" of all, "off" of none.
        warmup: steps in which a sparse codec sends more than its density; 0: none.
        worker: name, so that workers draw different lots.

    Raises:
        ConfigError: an unknown codec, or a warm-up of a codec without density.
    """

    def __init__(self, compress: str, *, feedback: str = "auto", warmup: int = 0, worker: str = "") -> None:
        codecs.make_codec(compress)  # says what is wrong with it
        self.codec = codecs.codec(compress)
        if feedback not in ("auto", "on", "off"):
            raise ConfigError(f"feedback must be one of auto, on, off; got {feedback!r}")
        if warmup and not dgc.has_density(compress):
            raise ConfigError(f"compress_warmup is for topk and randk; compress is {compress!r}")
        self._feedback = feedback == "on" or (feedback == "auto" and self.codec.biased)
        self._warmup, self._worker = warmup, worker
        self._residuals = Residuals()
        self._momentum = MomentumCorrection()
        self._plain, self._half = codecs.codec("none"), codecs.codec("fp16")

    @property
    def lossless(self) -> bool:
        """Whether gradients travel as they are, in fp32."""
        return self.codec is self._plain and not self._feedback

    @property
    def corrects_momentum(self) -> bool:
        """Whether momentum has to be given to ``encode`` rather than to the server, where the optimizer has any."""
        return self._feedback and self.codec.sparse

    def leaves_alone(self, bucket: Bucket) -> bool:
        """Whether the payload of this bucket is the bytes of its fp32 values."""
        return bucket.rule != "optimizer" or self.lossless

    def on_device(self, bucket: Bucket) -> DeviceCodec | None:
        """The codec of this bucket where a GPU can encode it; None: it has to go through ``encode``, on the CPU."""
        if bucket.rule != "optimizer":
            return on_device(self._plain)
        alone = not (self._feedback or self.codec.coarse or self.codec.biased)
        return on_device(self.codec) if alone else None

    def encode(
        self,
        bucket: Bucket,
        values: torch.Tensor,
        *,
        step: int,
        weight: float,
        momentum: Mapping[str, HyperValue] | None = None,
    ) -> tuple[Codec, tuple[Buffer, ...]]:
        """The payload of one push and the codec that reads it.

        Args:
            values: the gradient, shape (numel,); overwritten.
            momentum: hyperparameters of SGD, to correct its momentum here.
        """
        if bucket.rule != "optimizer":
            return self._plain, self._plain.encode(values)
        codec = (
            codecs.codec(dgc.warmup_codec(self.codec.name, step, self._warmup)) if step < self._warmup else self.codec
        )
        if (self._feedback or codec.coarse or codec.biased) and not _is_finite(values):
            return self._half, self._half.encode(values)
        seed = self._seed(step, bucket.index)
        if not self._feedback or not weight:
            return codec, codec.encode(values, seed)
        if momentum is not None:
            self._momentum.accumulate(bucket.index, values, momentum)
        self._residuals.add_to(bucket.index, values)
        parts = codec.encode(values, seed)
        payload = memoryview(b"".join(parts))
        decoded = codec.decode(payload, torch.empty_like(values))
        self._residuals.keep(bucket.index, values, decoded)
        if momentum is not None:
            self._momentum.mask(bucket.index, decoded)
        return codec, (payload,)

    def dropped(self, bucket: Bucket, codec: Codec, payload: memoryview) -> None:
        """A push was answered but not applied."""
        if self._feedback and bucket.rule == "optimizer":
            decoded = codec.decode(payload, empty_fp32(bucket.numel))
            if _is_finite(decoded):
                self._residuals.put_back(bucket.index, decoded)

    def residual(self, bucket: Bucket) -> torch.Tensor:
        """What has been left out of one bucket so far, shape (numel,)."""
        kept = self._residuals.get(bucket.index)
        return empty_fp32(bucket.numel).zero_() if kept is None else kept

    def _seed(self, step: int, bucket: int) -> int:
        text = f"{self._worker} {step} {bucket}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _is_finite(values: torch.Tensor) -> bool:
    """Whether all are; the sum says so at once unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
