"""Storing the keys and values of a ragged row into their blocks."""
