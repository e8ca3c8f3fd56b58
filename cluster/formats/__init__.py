"""A model's text to typed deltas: reasoning, content, tool calls. Standard library only; no torch, no ray, no HTTP."""
