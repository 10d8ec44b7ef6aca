"""What the fork server loads once for all children: the server, the client, and what torch loads at first use."""

import os

os.environ["GRPC_VERBOSITY"] = ""  # as a server has it, which reads gRPC's lines

import torch

import torch_ps.ps.server.server
import torch_ps.worker.optim.optimizer
from torch_ps.common import optimizer_spec as optim

torch.set_num_threads(1)
optim.build("SGD", [torch.zeros(1)], {"lr": 0.1})

__all__ = ["torch_ps"]
