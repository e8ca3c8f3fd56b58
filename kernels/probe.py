"""Does a model compute rightly as one ragged row? Found out at load by running a few tokens through it.

Layers must come by our attention function, and nothing but attention may mix tokens: neither between sequences of a row
nor across steps (a convolution or a recurrent state would). Merged linears must give what separate ones gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diptych.protos.errors import StartupError

from .attention import AttentionStep, Compute, LayerShape, run_module
from .ops.ragged import Segment, build_batch

_BLOCK_TOKENS = 4
_PROMPT = 6  # tokens of the sequence under test; it lies in blocks 1 and 3
_BLOCKS = (1, 3)
# Relative error of a token's logits, the median over tokens: far below what a wrong computation gives (about 1), above
# what another order of additions gives through some tens of layers.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def find_layers(module: nn.Module, config: Any, device: torch.device) -> dict[int, LayerShape]:
    """The layers that call our attention function, by their number; StartupError names one that does not or cannot."""
    seen: dict[int, LayerShape] = {}
    batch = build_batch([Segment(0, 1, 0, (0,))], _BLOCK_TOKENS, device)
    name = type(module).__name__
    try:
        _logits(partial(run_module, module), [0], AttentionStep(batch, {}, seen), [0])
    except StartupError:
        raise
    except Exception as exc:  # whatever transformers' code raises when it cannot run like this
        raise StartupError(f"{name} is refused: it cannot compute a row of tokens without a cache: {exc!r}") from exc
    for layer, shape in sorted(seen.items()):
        if shape.refusal is not None:
            raise StartupError(f"{name} is refused: layer {layer} ({shape.name}) {shape.refusal}.")
    for layer in range(config.num_hidden_layers):
        if layer not in seen:
            raise StartupError(
                f"{name} is refused: layer {layer} does not dispatch through transformers' attention interface."
            )
    for layer, kind in enumerate(getattr(config, "layer_types", None) or []):
        if kind not in ("full_attention", "sliding_attention"):
            raise StartupError(f"{name} is refused: layer {layer} is of the unsupported type {kind}.")
        if kind == "sliding_attention" and seen[layer].window is None:
            raise StartupError(f"{name} is refused: layer {layer} does not tell attention its sliding window.")
    return seen


def compute_alone(model: Compute, vocab_size: int, shapes: Mapping[int, LayerShape], probe: Probe) -> Tensor:
    """Logits [6, V] of the probe's tokens as one undisturbed prompt."""
    kv = probe.new_kv(shapes)
    batch = build_batch([Segment(0, _PROMPT, 0, _BLOCKS)], _BLOCK_TOKENS, probe.device)
    return _logits(model, _ids(_PROMPT, 3, vocab_size), AttentionStep(batch, kv), list(range(_PROMPT)))


def compute_ragged(model: Compute, vocab_size: int, shapes: Mapping[int, LayerShape], probe: Probe) -> Tensor:
    """The same logits from two steps of four and two tokens, each behind another sequence in the row."""
    kv = probe.new_kv(shapes)
    ids, other = _ids(_PROMPT, 3, vocab_size), _ids(6, 11, vocab_size)
    first = build_batch([Segment(0, 5, 0, (2, 4)), Segment(5, 4, 0, _BLOCKS)], _BLOCK_TOKENS, probe.device)
    second = build_batch([Segment(0, 1, 5, (2, 4)), Segment(1, 2, 4, _BLOCKS)], _BLOCK_TOKENS, probe.device)
    begin = _logits(model, other[:5] + ids[:4], AttentionStep(first, kv), [5, 6, 7, 8])
    return torch.cat((begin, _logits(model, other[5:] + ids[4:], AttentionStep(second, kv), [1, 2])))


def differs(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """More than rounding lies between the two, for most of the tokens; NaN differs from everything."""
    error = (logits - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-12)
    return not bool(error.median() <= _TOLERANCE[dtype])


@dataclass(frozen=True, slots=True)
class Probe:
    """Where and in what type the probing passes run."""

    dtype: torch.dtype
    device: torch.device

    def new_kv(self, shapes: Mapping[int, LayerShape]) -> dict[int, tuple[Tensor, Tensor]]:
        """Five empty blocks for each layer."""

        def blocks(shape: LayerShape) -> Tensor:
            size = (5, shape.kv_heads, _BLOCK_TOKENS, shape.head_dim)
            return torch.zeros(size, dtype=self.dtype, device=self.device)

        return {layer: (blocks(shape), blocks(shape)) for layer, shape in shapes.items()}


def _ids(count: int, step: int, vocab_size: int) -> list[int]:
    return [(step * (index + 1)) % vocab_size for index in range(count)]


def _logits(model: Compute, ids: list[int], step: AttentionStep, wanted: list[int]) -> Tensor:
    device = step.batch.positions_T.device
    return model(torch.tensor(ids, device=device), step, torch.tensor(wanted, device=device))
