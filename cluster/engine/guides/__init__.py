"""Constraints made into guides: compiled beside the step loop, followed in it."""
