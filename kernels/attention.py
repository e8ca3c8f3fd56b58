"""The attention function that transformers' models call instead of their own, and what it refuses to compute.

A model hands every extra keyword of its forward down to the attention function: that is how the step's structure
arrives (`diptych_step`). Nothing about a step is global.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diptych.protos.errors import StartupError

from .ops.kv_write.launch import kv_write
from .ops.paged_attention.launch import QkvView, attend, paged_attention
from .ops.paged_attention.params import AttentionParams
from .ops.qk_write.launch import kv_store
from .ops.ragged import RaggedBatch

if TYPE_CHECKING:
    from .device.step import StepTensors

IMPLEMENTATION = "diptych_paged"
STEP_KEYWORD = "diptych_step"

# Keywords that carry nothing which changes the result here. Any other one with a value is refused at load.
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "return_dict", "output_attentions"}) | frozenset(
    {"output_hidden_states", "logits_to_keep", "position_embeddings", "is_causal", "output_router_logits"}
)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionStep:
    """One step as the attention function sees it. With `seen`, layers are recorded there and nothing is computed."""

    batch: RaggedBatch
    kv: Mapping[int, tuple[Tensor, Tensor]]  # by the layer's `layer_idx`
    seen: dict[int, LayerShape] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DeviceAttentionStep:
    """One step as the attention function sees it where nothing may ask the device."""

    tensors: StepTensors
    kv: Mapping[int, tuple[Tensor, Tensor]]  # by the layer's `layer_idx`
    last: int  # the layer whose keys and values are checked


# Token ids of the row [T], the step, row indices to give logits of [N] -> logits [N, V].
Compute = Callable[[Tensor, AttentionStep, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer asked of attention."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    refusal: str | None = field(default=None)


def diptych_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query [1, H, T, D], key and value [1, G, T, D] after rotation; gives [1, T, H, D]."""
    step: AttentionStep | DeviceAttentionStep | None = extra.pop(STEP_KEYWORD, None)
    if step is None:
        raise StartupError(f"{type(module).__name__} does not hand keyword arguments down to its attention function.")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(step, DeviceAttentionStep):
        params = AttentionParams(scaling, sliding_window, softcap, s_aux)
        return _attend_on_device(layer, query[0], key[0], value[0], step=step, params=params), None
    if step.seen is not None:
        refusal = _refusal(module, (query, key, value), attention_mask, dropout, extra)
        if layer in step.seen:
            refusal = refusal or "calls attention twice"
        shape = (query.shape[1], key.shape[1], key.shape[3])
        step.seen[layer] = LayerShape(type(module).__name__, *shape, sliding_window, refusal)
        return query.transpose(1, 2)[..., : value.shape[-1]].contiguous(), None
    k_NGBD, v_NGBD = step.kv[layer]
    kv_write(key[0].transpose(0, 1), value[0].transpose(0, 1), k_NGBD, v_NGBD, step.batch)
    params = AttentionParams(scaling, sliding_window, softcap, s_aux)
    out_THD = paged_attention(query[0].transpose(0, 1), k_NGBD, v_NGBD, step.batch, params)
    return out_THD[None], None


def _attend_on_device(
    layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, *, step: DeviceAttentionStep, params: AttentionParams
) -> Tensor:
    """[1, T, H, D]."""
    k_NGBD, v_NGBD = step.kv[layer]
    q_THD, k_TGD, v_TGD = (part.transpose(0, 1) for part in (q_HTD, k_GTD, v_GTD))
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    check = layer == step.last
    kv_store(k_TGD, v_TGD, k_NGBD, v_NGBD, step.tensors, check=check)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    attend(q_THD, QkvView(k_TGD, v_TGD), k_NGBD, v_NGBD, step.tensors, params, out_THD)
    return out_THD[None]


def _refusal(
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    dropout: float,
    extra: dict[str, Any],
) -> str | None:
    """Why this call cannot be honoured, or None."""
    _, key, value = qkv
    if attention_mask is not None:
        return "builds an attention mask of its own"
    if key.shape != value.shape:
        return f"has keys of shape {tuple(key.shape)} but values of shape {tuple(value.shape)}"
    if getattr(module, "is_causal", True) is False or extra.get("is_causal") is False:
        return "is not causal"
    if dropout:
        return "applies dropout"
    unknown = sorted(name for name, given in extra.items() if given is not None and name not in _HARMLESS)
    if unknown:
        return f"gives attention the unsupported {', '.join(unknown)}"
    return None


def run_module(
    module: nn.Module, ids_T: Tensor, step: AttentionStep | DeviceAttentionStep, sampled_N: Tensor
) -> Tensor:
    """One pass of a causal language model over the row; logits of the sampled indices only."""
    positions_T = step.tensors.positions_T if isinstance(step, DeviceAttentionStep) else step.batch.positions_T
    output = module(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        logits_to_keep=sampled_N,
        **{STEP_KEYWORD: step},
    )
    logits: Tensor = output.logits[0]
    return logits


def register() -> None:
    """Make the function known to transformers under `IMPLEMENTATION`. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, diptych_attention)
