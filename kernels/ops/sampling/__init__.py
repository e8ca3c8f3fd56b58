"""Choosing one token per sampled row: greedy, or temperature, top-k and top-p with a counter-based random number."""
