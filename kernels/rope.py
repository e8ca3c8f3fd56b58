"""Rotary frequencies that change with a request's length, and the context within which they do not.

transformers picks them from the longest position of the row: `longrope` (Phi-3) rotates all of a request by long
factors once it passes the original context, `dynamic` once it passes max_position_embeddings. In a row of many requests
one would choose for all, and cached keys of a prefix would be right for short requests only. None may pass that point.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def context_tokens(module: nn.Module, config: Any) -> tuple[int, str | None]:
    """The positions that a model (with its text configuration) can serve, and why they are fewer than it has."""
    whole: int = config.max_position_embeddings
    limit = whole
    rotary: Any
    for rotary in module.modules():
        kinds = getattr(rotary, "rope_type", None)
        parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None)
        if not kinds or not parameters:
            continue
        # One kind and its parameters, or a mapping of each by the type of layer.
        per_layer = [(kinds, parameters)] if isinstance(kinds, str) else [(kinds[t], parameters[t]) for t in kinds]
        for kind, values in per_layer:
            if kind == "longrope":
                limit = min(limit, values["original_max_position_embeddings"])
            elif "dynamic" in kind:
                limit = min(limit, rotary.original_max_seq_len)
    if limit == whole:
        return whole, None
    return limit, (
        f"context of {limit} tokens instead of {whole}: beyond, the model's rotary frequencies (longrope) change with "
        "each request's length, which cached keys cannot follow"
    )
