"""Settings of every test run: one thread of torch, a fixed seed, and no option from the caller's environment."""

import os

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
