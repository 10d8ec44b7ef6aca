"""Runs several configurations side by side and writes the report; starts the other programs, imports neither."""
