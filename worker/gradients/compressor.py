"""Codecs of a worker: from a bucket's gradient to the payload of a push, from the payload of a pull to values.

    gradient --momentum--> + residual --codec--> payload        payload --codec--> values, or what the copy lacks
                               ^                    |                                        |
                               +-- what it lacks <--+                        copy += it <----+

Error feedback keeps what a lossy push left out and adds it to the next one:

    sent = C(gradient + residual)        residual = gradient + residual - decoded(sent)

So the sum of what was applied and what is kept is the sum of all gradients, whatever the codec does to each of them. A
biased codec converges with error feedback and may not without.

Rules of this file
  1. A gradient that is not finite travels as fp16, so that the server sees, counts and names it; the residual stays.
  2. A gradient of weight 0 leaves the residual alone: nothing of it will be applied.
  3. Where a parameter has no gradient, nothing is sent: its residual and its momentum wait for the next gradient.
  4. A push that was dropped as late goes back into the residual. A repeat is the same bytes and changes nothing here.

Memory: error feedback needs one fp32 copy of the parameters per worker, made at the first push.

Source: Seide et al., Interspeech 2014, and Karimireddy et al., ICML 2019, arXiv:1901.09847, for error feedback;
``momentum_correction.py`` for momentum.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch

from torch_ps.common import codecs
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.on_gpu import DeviceCodec, on_device
from torch_ps.common.codecs.plain import Bf16, Fp16, Plain
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import ConfigError
from torch_ps.common.optimizer_spec import HyperValue
from torch_ps.common.plan import Bucket
from torch_ps.common.wire.frames import Buffer
from torch_ps.worker.gradients.flat_tensors import empty_fp32
from torch_ps.worker.gradients.momentum_correction import MomentumCorrection, has_density, warmup_codec


class Compressor:
    """Encodes the gradients of one worker.

    Args:
        compress: codec of gradients.
        feedback: "auto" keeps the residual of biased codecs, "on" of all, "off" of none.
        warmup: number of first steps in which a sparse codec sends more than its density; 0 for none.
        worker: name of the worker; part of the seed of codecs that choose values at random.

    Raises:
        ConfigError: the codec does not exist, or has no density and ``warmup`` is given.
    """

    def __init__(self, compress: str, *, feedback: str = "auto", warmup: int = 0, worker: str = "") -> None:
        codecs.make_codec(compress)  # its error says what is wrong with the text
        self.codec = codecs.codec(compress)
        if feedback not in ("auto", "on", "off"):
            raise ConfigError(f"feedback must be one of auto, on, off; got {feedback!r}")
        if warmup and not has_density(compress):
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
        """Whether momentum has to be given to ``encode`` instead of the server, if the optimizer has any."""
        return self._feedback and self.codec.sparse

    def leaves_alone(self, bucket: Bucket) -> bool:
        """Whether the payload of a bucket is the bytes of its fp32 values."""
        return bucket.rule != "optimizer" or self.lossless

    def encode_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> tuple[Codec, tuple[Buffer, ...]] | None:
        """Encode the gradient of one bucket from where it is: flat fp32 tensors, one after the other, only read.

        The payload may be their memory. None: what ``encode`` does has to be done on a copy of the values.
        """
        codec = self._plain if bucket.rule != "optimizer" else self.codec
        if self._feedback or not isinstance(codec, Plain | Fp16 | Bf16):
            return None
        return codec, codec.encode_parts(parts)

    def repeats(self, bucket: Bucket) -> bool:
        """Whether encoding the same gradient again gives the same bytes and changes nothing here."""
        return bucket.rule != "optimizer" or not self._feedback

    def on_device(self, bucket: Bucket) -> DeviceCodec | None:
        """The codec of a bucket if a GPU can encode it; None if it has to go through ``encode``, on the CPU."""
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
        absent: Collection[int] = (),
    ) -> tuple[Codec, tuple[Buffer, ...]]:
        """Encode the gradient of one bucket.

        Args:
            bucket: bucket of the gradient.
            values: gradient, shape (numel,), fp32; overwritten.
            step: step of the push.
            weight: part of the gradient in the mean.
            momentum: hyperparameters of SGD if its momentum is to be corrected here.
            absent: positions of the bucket's pieces whose parameter has no gradient.

        Returns:
            The codec that decodes the payload, and the payload.
        """
        if bucket.rule != "optimizer":
            return self._plain, self._plain.encode(values)
        codec, present = self.codec, tuple(bucket.others(frozenset(absent)))
        for span in bucket.spans(absent):
            values[span] = 0.0  # weight decay may be in it
        if step < self._warmup:
            codec = codecs.codec(warmup_codec(codec.name, step, self._warmup))
        if (self._feedback or codec.coarse or codec.biased) and not _is_finite(values):
            return self._half, self._half.encode(values)
        seed = self._seed(step, bucket.index)
        if not self._feedback or not weight:
            return codec, codec.encode(values, seed)
        if momentum is not None:
            self._momentum.accumulate(bucket.index, values, momentum, present)
        self._residuals.add_to(bucket.index, values, present)
        parts = codec.encode(values, seed)
        payload = memoryview(b"".join(parts))
        decoded = codec.decode(payload, torch.empty_like(values))
        self._residuals.keep(bucket.index, values, decoded, present)
        if momentum is not None:
            self._momentum.mask(bucket.index, decoded, present)
        return codec, (payload,)

    def put_back(self, bucket: Bucket, codec: Codec, payload: memoryview, absent: Collection[int] = ()) -> None:
        """Add the payload of a push that was answered but not applied to the residual, except for what was absent."""
        if self._feedback and bucket.rule == "optimizer":
            decoded = codec.decode(payload, empty_fp32(bucket.numel))
            if _is_finite(decoded):
                self._residuals.put_back(bucket.index, decoded, tuple(bucket.others(frozenset(absent))))

    def residual(self, bucket: Bucket) -> torch.Tensor:
        """What has been left out of one bucket so far, shape (numel,), fp32; zeros if nothing was."""
        kept = self._residuals.get(bucket.index)
        return empty_fp32(bucket.numel).zero_() if kept is None else kept

    def _seed(self, step: int, bucket: int) -> int:
        text = f"{self._worker} {step} {bucket}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Residuals:
    """The residuals of one worker, by number of the bucket. ``spans`` are the elements that a call is about."""

    def __init__(self) -> None:
        self._of: dict[int, torch.Tensor] = {}

    def add_to(self, bucket: int, values: torch.Tensor, spans: Sequence[slice] = (slice(None),)) -> None:
        """Add the residual of a bucket to ``values``, in place."""
        if bucket in self._of:
            for span in spans:
                values[span].add_(self._of[bucket][span])

    def keep(
        self, bucket: int, sent: torch.Tensor, decoded: torch.Tensor, spans: Sequence[slice] = (slice(None),)
    ) -> None:
        """Keep what ``decoded`` lacks of ``sent`` as the residual of a bucket."""
        if bucket not in self._of:
            self._of[bucket] = torch.zeros_like(sent)
        for span in spans:
            torch.sub(sent[span], decoded[span], out=self._of[bucket][span])

    def put_back(self, bucket: int, decoded: torch.Tensor, spans: Sequence[slice] = (slice(None),)) -> None:
        """Add a push that came too late to count: all of it was left out after all."""
        if bucket in self._of:
            for span in spans:
                self._of[bucket][span].add_(decoded[span])

    def get(self, bucket: int) -> torch.Tensor | None:
        """The residual of a bucket, shape (numel,); None if nothing was ever kept."""
        return self._of.get(bucket)


class Decompressor:
    """Decodes the parameters that the servers send to one worker. The answers of one shard come one at a time.

    Args:
        codec: codec of pulls. A coarse one sends what the worker's copy lacks, so a copy is kept.
        buckets: all buckets of the job.
    """

    def __init__(self, codec: Codec, buckets: Sequence[Bucket]) -> None:
        self._codec, self._copies = codec, Copies()
        largest = max((bucket.numel for bucket in buckets), default=0)
        self._scratch = {shard: empty_fp32(largest) for shard in {bucket.shard for bucket in buckets}}

    def decode(
        self, bucket: Bucket, name: str, payload: memoryview, *, delta: bool, room: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decode the parameters of one bucket.

        Args:
            bucket: bucket of the payload.
            name: codec of the payload.
            payload: bytes that came.
            delta: whether the payload is what the worker's copy lacks, not the values themselves.
            room: memory to decode to, shape (numel,), fp32; None: memory of this object.

        Returns:
            Values, shape (numel,), fp32; valid until the next answer of the same shard. They are in ``room`` if they
            had to be decoded.

        Raises:
            CorruptFrame: the payload does not fit the bucket.
        """
        codec = codecs.codec(name)
        codec.check(payload, bucket.numel)
        scratch = self._scratch[bucket.shard][: bucket.numel] if room is None or delta else room
        values = codec.decode(payload, scratch)
        if self._codec.coarse and bucket.rule == "optimizer":
            values = self._copies.take(bucket.index, values, delta=delta)
        return values


def _is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite. The sum shows it at once, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
