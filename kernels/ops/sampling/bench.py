"""What is measured of sampling: the largest logit, as every step takes it, and 64 rows that ask for more; the peers are
torch's, which sort for filters. Bytes: the logits once, and what is drawn from once as weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.protos.step import LogitRules, SampleSpec

from ..cases import Case
from .launch import choose_as_asked, choose_largest
from .space import SampleSpace
from .testing import AskedStep

_VOCAB = 128_256
_ASKING = 64
_HISTORY = 1024
_DRAW = SampleSpec(0.8, 1.0, 0, 1, _HISTORY)
_PENALTIES = LogitRules(num_prompt=512, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1)
_LISTS = LogitRules(
    num_prompt=512,
    allowed_token_ids=tuple(range(0, _VOCAB, 3)),
    logit_bias=tuple((token, 1.0) for token in range(100)),
    bad_words=tuple((token,) for token in range(64)),
)
_SPECS = {
    "drawn": _DRAW,
    "top_k 50": replace(_DRAW, top_k=50),
    "top_p 0.9": replace(_DRAW, top_p=0.9),
    "top_k 50, top_p 0.9, min_p 0.02": replace(_DRAW, top_k=50, top_p=0.9, min_p=0.02),
    "penalties, largest": replace(_DRAW, temperature=0.0, rules=_PENALTIES),
    "lists, largest": replace(_DRAW, temperature=0.0, rules=_LISTS),
}


def _logits(rows: int, vocab: int, device: torch.device) -> tuple[Tensor]:
    return (3 * torch.randn(rows, vocab, device=device, dtype=torch.bfloat16),)


def _largest(space: SampleSpace, tokens_N: Tensor, flags_N: Tensor, logits_NV: Tensor) -> None:
    choose_largest(logits_NV, space, tokens_N, flags_N)


def _asked(step: AskedStep, logits_NV: Tensor) -> None:
    choose_largest(logits_NV, step.space, step.tokens_N, step.flags_N)
    choose_as_asked(logits_NV, step.asking, step.state, step.space, step.tokens_N, step.flags_N)


def _torch_draw(spec: SampleSpec, logits_NV: Tensor) -> Tensor:
    """Another number than ours, of the same distribution."""
    weights_NV = torch.softmax(logits_NV.float() / spec.temperature, dim=-1)
    if spec.top_k or spec.top_p < 1:
        weights_NV, ids_NV = torch.sort(weights_NV, dim=-1, descending=True)
        if spec.top_k:
            weights_NV[:, spec.top_k :] = 0.0
        before_NV = weights_NV.cumsum(dim=-1) - weights_NV
        weights_NV = torch.where(before_NV < spec.top_p * weights_NV.sum(dim=-1, keepdim=True), weights_NV, 0.0)
    noise_NV = torch.empty_like(weights_NV).exponential_()
    chosen_N1 = (weights_NV / noise_NV).argmax(dim=-1, keepdim=True)
    return ids_NV.gather(1, chosen_N1) if spec.top_k or spec.top_p < 1 else chosen_N1


def cases(device: torch.device) -> Iterator[Case]:
    """rows x tokens, and what each row asks for."""
    for rows, vocab in ((1, _VOCAB), (64, _VOCAB), (512, _VOCAB), (512, 151_936)):
        space = SampleSpace(max_rows=rows, vocab=vocab, device=device)
        chosen = (
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )
        yield Case(
            name=f"{rows}x{vocab}, largest",
            make=partial(_logits, rows, vocab, device),
            run=partial(_largest, space, *chosen),
            size_bytes=2 * rows * vocab,
            peers={"torch": _torch_largest},
        )
    for name, spec in _SPECS.items():
        for rows in (1, _ASKING):
            history = [(7 * at) % 5000 for at in range(_HISTORY)]
            step = AskedStep([spec] * rows, [history] * rows, vocab=_VOCAB, device=device)
            peers: dict[str, Any] = {"torch": partial(_torch_draw, spec)} if spec.rules is None else {}
            yield Case(
                name=f"{rows}x{_VOCAB}, {name}",
                make=partial(_logits, rows, _VOCAB, device),
                run=partial(_asked, step),
                size_bytes=(2 + 4) * rows * _VOCAB,
                peers=peers,
            )


def _torch_largest(logits_NV: Tensor) -> Tensor:
    return logits_NV.argmax(dim=-1)
