"""What is measured of sparse layers: qwen3-30b-a3b's, router included; the peers are transformers' forms of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from ..parts import Parts
from .experts import Experts, MoeWorkspace
from .launch import moe

_EXPERTS, _TOP_K, _HIDDEN, _INNER = 128, 8, 2048, 768
_TOKENS = (1, 8, 16, 64, 256, 512, 2048, 4096, 8192)
_FORMS = {"batched_mm": 64, "grouped_mm": 8192}  # the most tokens that are tried: the first copies weights by token


def _normal(device: torch.device, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)


def make_experts(device: torch.device) -> Experts:
    """One layer with random weights, 1.2 GB."""
    return Experts(
        _normal(device, _EXPERTS, _HIDDEN),
        _normal(device, _EXPERTS, 2 * _INNER, _HIDDEN),
        _normal(device, _EXPERTS, _HIDDEN, _INNER),
        _TOP_K,
        True,
    )


def _inputs(tokens: int, device: torch.device) -> tuple[Tensor]:
    return (torch.randn(tokens, _HIDDEN, device=device, dtype=torch.bfloat16),)


def _ours(experts: Experts, workspace: MoeWorkspace, x_TH: Tensor) -> Parts:
    return moe(x_TH, experts, workspace)


def _touched_bytes(tokens: int) -> int:
    """Weights of the experts that random choices touch, and each number of the tokens and pairs once."""
    touched = _EXPERTS * (1 - (1 - _TOP_K / _EXPERTS) ** tokens)
    each = 2 * 3 * _INNER * _HIDDEN
    return int(touched * each) + 2 * tokens * (_HIDDEN + _TOP_K * (2 * _INNER + _HIDDEN))


def _peers(experts: Experts, tokens: int) -> Mapping[str, Callable[..., object]]:
    try:
        from transformers import AutoConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return {}
    config: Any = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=_HIDDEN,
        moe_intermediate_size=_INNER,
        num_experts=_EXPERTS,
        num_experts_per_tok=_TOP_K,
        norm_topk_prob=True,
    )
    peers: dict[str, Callable[..., object]] = {}
    for form, most in _FORMS.items():
        if tokens <= most:
            with torch.device("meta"):
                block: Any = Qwen3MoeSparseMoeBlock(config).requires_grad_(False)
            block.gate.weight = torch.nn.Parameter(experts.router_EH, requires_grad=False)
            block.experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_EIH, requires_grad=False)
            block.experts.down_proj = torch.nn.Parameter(experts.down_EHI, requires_grad=False)
            peers[f"transformers {form}"] = partial(_theirs, block, form)
    return peers


def _theirs(block: Any, form: str, x_TH: Tensor) -> object:
    block.experts.config._experts_implementation = form
    with torch.inference_mode():
        return block(x_TH[None])


def cases(device: torch.device) -> Iterator[Case]:
    """By tokens of a step."""
    experts = make_experts(device)
    workspace = MoeWorkspace(experts, max_tokens=max(_TOKENS))
    for tokens in _TOKENS:
        yield Case(
            name=f"{tokens} tokens, {_TOP_K} of {_EXPERTS} experts of {_HIDDEN} x {_INNER}",
            make=partial(_inputs, tokens, device),
            run=partial(_ours, experts, workspace),
            size_bytes=_touched_bytes(tokens),
            flop=tokens * _TOP_K * 6 * _HIDDEN * _INNER if tokens >= 2048 else 0,
            peers=_peers(experts, tokens),
        )
