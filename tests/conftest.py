"""Settings of every test run: one thread of torch, a fixed seed, and no option from the caller's environment."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps.worker  # noqa: F401  # as in a user's process, before gRPC is loaded

# For child processes too: on two cores, two processes must not each start a thread per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

for _name in [name for name in os.environ if name.startswith("PS_")]:
    del os.environ[_name]

#: Folders whose tests take longest. They come first, so that no long one is left when all others are done.
LONGEST = ("soak", "chaos", "deploy", "integrations", "observability", "fuzz", "failover", "bench")


def pytest_configure() -> None:
    """A shell that starts the tests in the background has Ctrl-C ignored, also by the processes that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(LONGEST)}
    folder = len(Path(__file__).parts) - 1
    items.sort(key=lambda item: places.get(item.path.parts[folder], len(places)))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets the log up for itself, not for the tests after it."""
    logger = logging.getLogger("torch_ps")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
