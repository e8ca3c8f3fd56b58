"""What is measured of sparse layers: qwen3-30b-a3b's and Mixtral's, router included; peers: transformers' forms.

Ours leaves the experts' outputs as addends, which the next layer's norm adds while it reads; theirs adds them itself.
All run in graphs, over inputs that choose other experts in each call.
"""

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

_Shape = tuple[int, int, int, int]  # experts, top k, hidden size, an expert's inner size
_QWEN: _Shape = (128, 8, 2048, 768)
_MIXTRAL: _Shape = (8, 2, 4096, 14336)
_TOKENS = {_QWEN: (1, 8, 16, 64, 256, 512, 2048, 4096, 8192), _MIXTRAL: (1, 64, 512, 4096)}
_COMPUTED = 2048  # tokens from which FLOP count, not bytes
_FORMS = {"batched_mm": 64, "grouped_mm": 8192}  # the most tokens that are tried: the first copies weights by token


def _normal(device: torch.device, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)


def make_experts(device: torch.device, shape: _Shape = _QWEN) -> Experts:
    """One layer with random weights, 1.2 GB; 2.8 of Mixtral's."""
    experts, top_k, hidden, inner = shape
    return Experts(
        _normal(device, experts, hidden),
        _normal(device, experts, 2 * inner, hidden),
        _normal(device, experts, hidden, inner),
        top_k,
        True,
    )


def _inputs(tokens: int, hidden: int, device: torch.device) -> tuple[Tensor]:
    return (torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16),)


def _ours(experts: Experts, workspace: MoeWorkspace, x_TH: Tensor) -> Parts:
    return moe(x_TH, experts, workspace)


def _touched_bytes(tokens: int, shape: _Shape) -> int:
    """Weights of the experts that random choices touch, and each number of the tokens and pairs once."""
    experts, top_k, hidden, inner = shape
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    return int(touched * 6 * inner * hidden) + 2 * tokens * (hidden + top_k * (2 * inner + hidden))


def _peers(experts: Experts, tokens: int) -> Mapping[str, Callable[..., object]]:
    try:
        from transformers import AutoConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return {}
    config: Any = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=_QWEN[2],
        moe_intermediate_size=_QWEN[3],
        num_experts=_QWEN[0],
        num_experts_per_tok=_QWEN[1],
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
    """By tokens of a step; one layer's weights at a time are on the card."""
    for shape, sizes in _TOKENS.items():
        experts, top_k, hidden, inner = shape
        layer = make_experts(device, shape)
        workspace = MoeWorkspace(layer, max_tokens=max(sizes))
        for tokens in sizes:
            yield Case(
                name=f"{tokens} tokens, {top_k} of {experts} experts of {hidden} x {inner}",
                make=partial(_inputs, tokens, hidden, device),
                run=partial(_ours, layer, workspace),
                size_bytes=_touched_bytes(tokens, shape),
                flop=tokens * top_k * 6 * hidden * inner if tokens >= _COMPUTED else 0,
                peers=_peers(layer, tokens) if shape is _QWEN else {},
            )
