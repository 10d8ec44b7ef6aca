"""Defaults of samples, batch size and learning rate for each ready-made task.

With these ``samples`` the four default runs of two workers take less than five minutes on two CPU cores. Learning rate
and batch size repeat the task's own, as a rate can be scaled only when it is known; a test compares them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """Defaults of one task.

    Attributes:
        samples: samples that the whole job trains on in each run.
        batch_size: samples per step of one worker.
        lr: base learning rate, that of an asynchronous run.
    """

    samples: int
    batch_size: int
    lr: float


TASKS: dict[str, TaskDefaults] = {
    "gpt": TaskDefaults(samples=4000, batch_size=8, lr=1e-3),
    "digits": TaskDefaults(samples=96000, batch_size=32, lr=0.1),
    "digits:cnn": TaskDefaults(samples=24000, batch_size=32, lr=0.1),
}

#: Default of ``samples`` for a task of the user, which has its own learning rate and batch size.
OWN_TASK_SAMPLES = 20000
