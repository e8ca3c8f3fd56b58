"""Choosing one token per sampled row: rules on its logits, then greedy or a draw with a counter-based random number."""
