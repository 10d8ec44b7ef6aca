"""How much work one run does where nothing is said, per ready-made task. Change the figures here.

``samples`` lets the four default runs with two workers end within five minutes on two CPU cores. Learning rate and
batch size repeat the task's own, because a rate can be scaled only when it is known; a test compares them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """``lr`` is the base rate, that of an asynchronous run; ``samples`` are the job's, of each run."""

    samples: int
    batch_size: int
    lr: float


TASKS: dict[str, TaskDefaults] = {
    "gpt": TaskDefaults(samples=4000, batch_size=8, lr=1e-3),
    "digits": TaskDefaults(samples=96000, batch_size=32, lr=0.1),
    "digits:cnn": TaskDefaults(samples=24000, batch_size=32, lr=0.1),
}

#: For a task of the user's own; its rate and batch size are the task's business.
OWN_TASK_SAMPLES = 20000
