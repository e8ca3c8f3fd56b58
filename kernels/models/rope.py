"""Rotary frequencies of the kinds that hand-written decoders know, and the table of cosines and sines by position.

The kinds that depend on a request's length (dynamic, longrope) are left to transformers' path, which limits contexts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .shape import GenericOnly


def frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Radians a position of each of the D / 2 points, float32 on the CPU, and a factor of all cosines and sines.

    GenericOnly: a kind that is not known, or lacks a parameter.
    """
    kind = rope["rope_type"]
    make = _KINDS.get(kind)
    if make is None:
        raise GenericOnly(f"its rotary frequencies are of type {kind}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    try:
        return make(1.0 / (rope["rope_theta"] ** exponents), rope)
    except (KeyError, TypeError) as exc:
        raise GenericOnly(f"its rotary frequencies of type {kind} are unusual: {exc!r}") from exc


def _default(plain: Tensor, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    return plain, 1.0


def _linear(plain: Tensor, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    return plain / rope["factor"], 1.0


def _llama3(plain: Tensor, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Slow points are slowed down by `factor`, fast ones stay, those between are blended by their turns in the old
    context.
    """
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * plain / factor + share * plain, 1.0


def _yarn(plain: Tensor, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Peng et al., "YaRN" (2023): as llama3, but blended by the index of the point."""
    factor, old, base = rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]
    size = 2 * len(plain)

    def index(turns: float) -> float:
        """Of the point, counted in numbers of the head, that turns so often in the old context."""
        return size * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    span = last - first if last != first else 0.001
    slowed = ((torch.arange(len(plain), dtype=torch.float32) - first) / span).clamp(0.0, 1.0)
    scale = rope.get("attention_factor")
    if scale is None:
        one, all_dims = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
        scale = _magnitude(factor, one if one and all_dims else 1.0)
        if one and all_dims:
            scale /= _magnitude(factor, all_dims)
    return plain / factor * slowed + plain * (1 - slowed), float(scale)


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


_KINDS: dict[str, Callable[[Tensor, Mapping[str, Any]], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
