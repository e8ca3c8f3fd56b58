"""Modules that take the place of a model's own at load time."""
