"""Gradients and parameters as a push takes them: flat buckets, compression, local steps."""
