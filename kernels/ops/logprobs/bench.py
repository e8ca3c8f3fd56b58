"""What is measured of logprobs: sampled rows and a prompt's, with their alternatives; the peer is torch's log_softmax
and topk, which does not say in which order equal ones come.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from .columns import Logprobs
from .launch import logprobs

_VOCAB = 128_256


def _make(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV = 3 * torch.randn(rows, _VOCAB, device=device, dtype=torch.bfloat16)
    tokens_R = torch.randint(0, _VOCAB, (rows,), device=device)
    return logits_NV, torch.arange(rows, device=device), tokens_R


def _ours(most: int, logits_NV: Tensor, rows_R: Tensor, tokens_R: Tensor) -> Logprobs:
    return logprobs(logits_NV, rows_R, tokens_R, most)


def _torch(most: int, logits_NV: Tensor, rows_R: Tensor, tokens_R: Tensor) -> tuple[Tensor, ...]:
    all_RV = torch.log_softmax(logits_NV[rows_R].float(), dim=-1)
    own_R1 = all_RV.gather(1, tokens_R[:, None])
    return own_R1, (all_RV > own_R1).sum(dim=-1), *torch.topk(all_RV, max(1, most), dim=-1)


def cases(device: torch.device) -> Iterator[Case]:
    """rows x tokens, alternatives."""
    for rows, most in ((1, 0), (1, 20), (64, 0), (64, 5), (64, 20)):
        yield Case(
            name=f"{rows}x{_VOCAB}, {most} alternatives",
            make=partial(_make, rows, device),
            run=partial(_ours, most),
            size_bytes=2 * 2 * rows * _VOCAB,  # read for the sum, and again
            peers={"torch": partial(_torch, most)},
        )
