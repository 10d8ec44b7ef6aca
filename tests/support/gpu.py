"""Tests of what happens on a GPU: on one where torch finds it, and always on the CPU in its place.

``scripts/gpu`` runs the former where there is a GPU. The CPU takes the same steps: packs, encodes and copies to
(ordinary) memory; only streams and marks do nothing. What a missing wait would do there shows on a GPU alone.
"""

import threading
from collections.abc import Sequence

import pytest
import torch

#: Mark of a test that needs a GPU; ``tests/conftest.py`` skips it where torch finds none.
GPU = pytest.mark.gpu
#: Program of a server that stages its parameters on the CPU.
STAGED = "tests.support.gpu:serve"
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def serve(arguments: Sequence[str]) -> None:
    """``ps-serve`` that takes its CPU for a device of its own: parameters are staged as those of a GPU are."""
    from torch_ps.ps.server import cli, server

    server.choose_device = lambda wanted, local_rank=0: torch.device("cpu", 0)  # type: ignore[attr-defined]
    cli.main(list(arguments))


def names_of_threads() -> set[str]:
    """Names of the threads of this process, without the numbers at their ends."""
    return {thread.name.partition("_")[0] for thread in threading.enumerate()}


def sleep() -> None:
    """Keep this thread's stream on the GPU busy for some milliseconds; returns at once."""
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
