"""Queries and keys normalised and rotated, keys and values stored into their blocks: one pass over the projection."""
