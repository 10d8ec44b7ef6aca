"""The commands ps-worker, ps-run and ps-status."""
