"""Tensors of any dtype as words of 32 bits, for what is kept as it is and not computed with.

    tensor [1, 2, 3] int64 --> its 24 bytes --> 6 words, which travel and are stored as fp32 values do

No function computes with the words, so every bit pattern comes back, those that are NaN in fp32 included.
"""

import torch

#: Bytes of a word.
WORD = 4


def num_words(numel: int, dtype: torch.dtype) -> int:
    """Number of words that hold ``numel`` elements."""
    return -(-numel * dtype.itemsize // WORD)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor`` in order of its elements, uint8 of shape (n,); a view where it is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def read_words(tensor: torch.Tensor, start: int, into: torch.Tensor) -> None:
    """Copy the words of ``tensor`` from number ``start`` on into ``into``, shape (n,), fp32; fill up with zeros."""
    part = bytes_of(tensor)[WORD * start : WORD * (start + into.numel())]
    room = into.view(torch.uint8)
    room[: part.numel()].copy_(part)
    room[part.numel() :].zero_()


def write_words(words: torch.Tensor, start: int, into: torch.Tensor) -> None:
    """Copy ``words``, shape (n,), fp32, to where the words from number ``start`` on of ``into``, contiguous, are."""
    room = into.view(-1).view(torch.uint8)[WORD * start : WORD * (start + words.numel())]
    room.copy_(words.view(torch.uint8)[: room.numel()])


def from_words(words: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor on the CPU from all of its ``words``, fp32."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    write_words(words, 0, tensor)
    return tensor
