"""Ready-made tasks: a byte-level GPT and handwritten digits; and the registry that also loads tasks of users."""

from torch_ps.worker.tasks.base import Task
from torch_ps.worker.tasks.registry import READY_MADE, check, load

__all__ = ["READY_MADE", "Task", "check", "load"]
