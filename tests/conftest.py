"""Settings of every test run: one thread of torch, a fixed seed, and no option from the caller's environment."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

# For child processes too: on two cores, two processes must not each start a thread per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

for _name in [name for name in os.environ if name.startswith("PS_")]:
    del os.environ[_name]


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
