"""Ready-made tasks: a byte-level GPT, handwritten digits, and the door for one's own.

Source: see the module of each task.
"""

from torch_ps.worker.tasks.base import Task
from torch_ps.worker.tasks.registry import READY_MADE, check, load

__all__ = ["READY_MADE", "Task", "check", "load"]
