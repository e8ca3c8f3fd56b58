"""Batches: many requests from a file, worked on beside the interactive ones: see README.md."""
