"""A small GPT on bytes: the default task of ``ps-compare``.

    byte --> [ x + attention(norm(x)), x + mlp(norm(x)) ] x 3 --> norm --> tied embedding --> 256 logits

Pre-norm, causal attention by torch's ``scaled_dot_product_attention``, rotary positions, GELU, no biases beside the
matrices, output tied to the input embedding; 1.4 M parameters. All sizes and rates were chosen by measurement for what
two CPU cores learn in forty seconds: many small steps, positions that need not be learned, and a first-moment decay of
0.8, because momentum multiplies what staleness costs.

Source: Radford et al. 2019 (GPT-2) for the shape; Press and Wolf, arXiv:1608.05859, for the tie; Su et al.,
arXiv:2104.09864, for rotary positions; Mitliagkas et al., arXiv:1605.09774, for momentum and asynchrony.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from torch_ps.worker.tasks import sampler, text
from torch_ps.worker.tasks.base import Task

VOCABULARY = 256  # one token is one byte

#: Number of windows that ``evaluate`` reads, spread evenly over the validation text.
VALIDATION_WINDOWS = 96

PROMPT = "def "
SAMPLE_BYTES = 200


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the model.

    Attributes:
        width: numbers per byte; a multiple of twice the ``heads``.
        context: largest number of bytes that the model sees.
    """

    width: int = 192
    layers: int = 3
    heads: int = 6
    context: int = 64


def rotation(length: int, size: int) -> torch.Tensor:
    """Angles of the rotary positions: shape (2, length, size / 2), cosine and sine.

    Wavelengths go from 2 pi to 1000 times that, which covers the context many times over.
    """
    angle = torch.arange(length)[:, None] * 1000.0 ** (-torch.arange(0, size, 2) / size)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn each pair of ``x``, shape (..., length, size), so that products of two depend on their distance alone."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


class Block(nn.Module):
    """One layer: attention over the bytes so far, then a two-layer network on each byte."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention_in = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attention_out = nn.Linear(size.width, size.width, bias=False)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp_in = nn.Linear(size.width, 4 * size.width, bias=False)
        self.mlp_out = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.attention_in(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, *turn), rotate(key, *turn)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x


class Gpt(nn.Module):
    """Bytes of shape (batch, length), length <= context, int64, to logits of shape (batch, length, 256)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.turn: torch.Tensor
        self.register_buffer("turn", rotation(size.context, size.width // size.heads), persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                nn.init.zeros_(parameter)  # each layer starts as the identity
            elif name == "byte.weight":
                nn.init.normal_(parameter, std=0.02)  # all bytes start about equally likely
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.byte(tokens)
        turn = self.turn[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.norm(x), self.byte.weight)


class GptTask(Task):
    """Predict the next byte of source code, or of any text; the loss is in nats per byte.

    A sample is one window of 65 bytes: 64 predictions.
    """

    name = "gpt"
    default_lr = 1e-3
    default_batch_size = 8

    def __init__(self, data: str = "", size: Size | None = None) -> None:
        self.size = size or Size()
        self._text = text.read(data, least=self.size.context + 1)
        self._window = torch.arange(self.size.context + 1)

    def model(self) -> nn.Module:
        return Gpt(self.size)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), fused=True)

    def schedule(self, progress: float) -> float:
        """Linear warm-up over the first tenth, then half a cosine down to a tenth."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return min(1.0, (progress + 0.002) / 0.1) * (0.1 + 0.9 * cosine)

    def batches(self, rank: int, world: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        training = self._text.training
        starts = len(training) - self.size.context
        for start in sampler.drawn(starts, rank, world, batch_size, seed):
            yield training[start[:, None] + self._window].long()

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        validation = self._text.validation
        last = len(validation) - len(self._window)
        start = torch.linspace(0, last, min(VALIDATION_WINDOWS, last + 1), dtype=torch.float64).long()
        batch = validation[start[:, None] + self._window].long().to(_device(model))
        return {"loss": self.loss(model, batch).item()}

    def sample(self, model: nn.Module) -> str:
        return generate(model, PROMPT, SAMPLE_BYTES, self.size.context)


def generate(
    model: nn.Module, prompt: str, length: int, context: int, *, temperature: float = 0.7, seed: int = 0
) -> str:
    """Extend ``prompt`` by ``length`` bytes sampled from the model.

    Args:
        model: model with logits per byte, as ``Gpt`` has, in evaluation mode; the caller disables gradients.
        prompt: at least one byte.
        length: number of bytes to add.
        context: largest number of bytes that the model can read.
        temperature: divisor of the logits, > 0; below 1 prefers likely bytes.
        seed: seed of the sampling; the same seed and model give the same text.

    Returns:
        Prompt and continuation; bytes that are not UTF-8 become U+FFFD.
    """
    generator = torch.Generator().manual_seed(seed)
    written = list(prompt.encode())
    for _ in range(length):
        tokens = torch.tensor([written[-context:]], device=_device(model))
        logits = model(tokens)[0, -1].float().cpu() / temperature
        written.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return bytes(written).decode(errors="replace")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
