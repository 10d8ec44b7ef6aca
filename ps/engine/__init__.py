"""Obeys the core's effects on tensors: lanes of bucket jobs, optimizer steps, clipping, encoded responses."""
