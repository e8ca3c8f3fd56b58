"""Logarithms of the model's own probabilities: of given tokens, their ranks, and the most likely alternatives."""
