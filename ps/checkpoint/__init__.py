"""Checkpoints: when they are written, in what form and where, and how a job resumes from one."""
