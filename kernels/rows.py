"""Attention over one ragged row of whole texts, without KV: what embedding.py runs transformers' models with.

The texts of a row lie by length, the longest first. On a CPU those of one length are one dense call and nothing is
padded; on a card, where calls are dear, those of similar lengths are, and attention alone sees padding. How the row is
divided reaches the function as a keyword of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IMPLEMENTATION = "diptych_rows"
KEYWORD = "diptych_rows"

# On an H200 one call of attention costs as much as padding of this size (all-MiniLM's and Qwen3-0.6B's shapes).
PADDED_TOKENS = 16
PADDED_PART = 0.25

# Keywords that carry nothing which changes the result here.
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "return_dict", "output_attentions"}) | frozenset(
    {"output_hidden_states", "position_embeddings", "output_router_logits", "token_type_ids"}
)


class NotRagged(Exception):
    """A model asks for what this function does not compute."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Of a run whose texts differ in length. `place_NL`: the row's token at each place of the dense form, any one where
    `is_text_NL` is false; `kept_T`: the places in the flat dense form that are the run's tokens, in their order.
    """

    place_NL: Tensor
    is_text_NL: Tensor
    kept_T: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """`count` texts, the longest of `length` tokens, from token `begin` to before `end` of the row."""

    begin: int
    end: int
    count: int
    length: int
    padding: Padding | None = None  # None: all are of this length

    def dense(self, part_TX: Tensor) -> Tensor:
        """The run's tokens, [T, ...] of the row, as [N, L, ...]."""
        if self.padding is None:
            return part_TX[self.begin : self.end].view(self.count, self.length, *part_TX.shape[1:])
        return part_TX[self.padding.place_NL]


def pads_on(device: torch.device) -> bool:
    """Whether attention pads there."""
    return device.type != "cpu"


def runs_of(lengths: Sequence[int], device: torch.device) -> list[Run]:
    """Of texts in their order in the row, none longer than the one before it."""
    least, part = (PADDED_TOKENS, PADDED_PART) if pads_on(device) else (0, 0.0)
    runs: list[Run] = []
    first = begin = 0
    for at in range(1, len(lengths) + 1):
        longest = lengths[first]
        if at < len(lengths) and longest - lengths[at] <= max(least, part * longest):
            continue
        run = _run(lengths[first:at], begin, device)
        runs.append(run)
        first, begin = at, run.end
    return runs


def _run(lengths: Sequence[int], begin: int, device: torch.device) -> Run:
    count, longest, end = len(lengths), lengths[0], begin + sum(lengths)
    if lengths[-1] == longest:
        return Run(begin, end, count, longest)
    length_N = torch.tensor(lengths)
    start_N = begin + length_N.cumsum(0) - length_N
    step_L = torch.arange(longest)
    is_text_NL = step_L < length_N[:, None]
    place_NL = (start_N[:, None] + step_L).where(is_text_NL, start_N[:, None])
    kept_T = is_text_NL.flatten().nonzero()[:, 0]
    return Run(begin, end, count, longest, Padding(*(part.to(device) for part in (place_NL, is_text_NL, kept_T))))


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query [1, H, T, D], key and value [1, G, T, D]; gives [1, T, H, D]. Raises NotRagged."""
    runs: Sequence[Run] | None = extra.pop(KEYWORD, None)
    if runs is None or attention_mask is not None or dropout:
        raise NotRagged(f"{type(module).__name__} hands its attention no row, or a mask or dropout of its own")
    if unknown := sorted(name for name, given in extra.items() if given is not None and name not in _HARMLESS):
        raise NotRagged(f"{type(module).__name__} gives attention the unsupported {', '.join(unknown)}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        raise NotRagged(f"{type(module).__name__} has a window that looks both ways")
    q_HTD, k_HTD, v_HTD = query[0], key[0], value[0]
    if k_HTD.shape[0] != q_HTD.shape[0]:
        shared = q_HTD.shape[0] // k_HTD.shape[0]
        k_HTD, v_HTD = (part.repeat_interleave(shared, dim=0) for part in (k_HTD, v_HTD))
    parts_THD = [part.transpose(0, 1) for part in (q_HTD, k_HTD, v_HTD)]
    out_THD = torch.empty((q_HTD.shape[1], q_HTD.shape[0], v_HTD.shape[2]), dtype=query.dtype, device=query.device)
    for run in runs:
        q_NHLD, k_NHLD, v_NHLD = (run.dense(part).transpose(1, 2) for part in parts_THD)
        mask = _mask(run, sliding_window, query.device, causal=causal)
        o_NHLD = functional.scaled_dot_product_attention(
            q_NHLD, k_NHLD, v_NHLD, attn_mask=mask, scale=scaling, is_causal=causal and mask is None
        )
        o_THD = o_NHLD.transpose(1, 2).flatten(0, 1)
        out_THD[run.begin : run.end] = o_THD if run.padding is None else o_THD[run.padding.kept_T]
    return out_THD[None], None


def _mask(run: Run, window: int | None, device: torch.device, *, causal: bool) -> Tensor | None:
    """Which keys a token sees; None: those that `is_causal` says. Padding lies behind a text: causality hides it."""
    if causal or run.padding is None:
        return _window(run.length, window, device)
    return run.padding.is_text_NL[:, None, None, :]


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys a token of a text longer than the window sees; None: the window hides none."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < window)


def register() -> None:
    """Make the function known to transformers. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, rows_attention)
