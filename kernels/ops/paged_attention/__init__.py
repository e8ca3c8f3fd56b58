"""Attention of a ragged row of new tokens over keys and values that lie in blocks."""
