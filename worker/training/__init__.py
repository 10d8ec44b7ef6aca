"""The training loop of the ready-made tasks and what belongs to it."""
