"""What a worker has sent ahead of its push, and whether it is still what the push would carry.

A loop may do anything to gradients after backward: ``.data``, numpy, dlpack, another tensor at the same address.
Neither the version of a tensor nor its identity tells, so bytes are compared: 8 ms for 64 MB on one core.
"""

from collections.abc import Iterable

import torch

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import Buffer, Frame, unpack


def number_if_same(frame: Frame | None, codec: str, parts: Iterable[Buffer]) -> int | None:
    """The number of an ``Ahead`` frame that holds exactly ``parts``, encoded by ``codec``; None if it does not.

    Args:
        frame: frame that was sent ahead; None: there is none.
        codec: name of the codec of ``parts``.
        parts: payload that would be sent now.
    """
    if frame is None:
        return None
    header, payload = unpack(frame, pb.UpHeader)
    if header.ahead.codec != codec:
        return None
    at = 0
    for part in parts:
        view = memoryview(part).cast("B")
        if not _same(payload[at : at + len(view)], view):
            return None
        at += len(view)
    return header.ahead.number if at == len(payload) else None


def _same(one: memoryview, other: memoryview) -> bool:
    """Whether two buffers hold the same bytes."""
    if len(one) != len(other):
        return False
    whole = len(one) // 8 * 8
    if whole and not torch.equal(
        torch.frombuffer(one[:whole], dtype=torch.int64), torch.frombuffer(other[:whole], dtype=torch.int64)
    ):
        return False
    return bytes(one[whole:]) == bytes(other[whole:])
