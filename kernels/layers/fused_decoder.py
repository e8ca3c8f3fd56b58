"""Llama's family without transformers' forward: the same modules' weights, a third of the operations.

At one token a step the time is that of calling operators, not of computing. Used where a model's class is listed here
and every layer is built as expected; whether it computes the same is found out at load, by the probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention import AttentionStep, LayerShape
from ..ops.kv_write.launch import kv_write
from ..ops.linear.reference import Linear
from ..ops.paged_attention.launch import paged_attention
from ..ops.paged_attention.params import AttentionParams
from ..ops.rms_norm.launch import rms_norm
from ..ops.rotate.launch import rotate
from .merged import MergedLinear
from .packed import PackedLinear

# Pre-norm, RMSNorm, rotation of the whole head, SiLU-gated MLP, plain head; Qwen3 also normalises queries and keys.
FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


@dataclass(slots=True, eq=False)
class _Norm:
    """An RMSNorm's weight (the module's own tensor) and epsilon."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(slots=True, eq=False)
class _Layer:
    """One decoder layer. H query heads, G KV heads, D head size; all linears packed."""

    index: int  # the model's number of the layer, under which the step holds its KV
    heads: int  # H
    kv_heads: int  # G
    params: AttentionParams
    norm: _Norm
    qkv: Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    out: Linear
    mlp_norm: _Norm
    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, step: AttentionStep) -> Tensor:
        heads, rotated = self.heads, self.heads + self.kv_heads
        qkv = self.qkv(self.norm(x_TH)).view(x_TH.shape[0], rotated + self.kv_heads, -1)
        if self.query_norm is not None and self.key_norm is not None:
            qkv[:, :heads] = self.query_norm(qkv[:, :heads])
            qkv[:, heads:rotated] = self.key_norm(qkv[:, heads:rotated])
        rotate(qkv[:, :rotated], cos_TD, sin_TD)
        k_NGBD, v_NGBD = step.kv[self.index]
        kv_write(qkv[:, heads:rotated], qkv[:, rotated:], k_NGBD, v_NGBD, step.batch)
        out_THD = paged_attention(qkv[:, :heads], k_NGBD, v_NGBD, step.batch, self.params)
        x_TH = self.out.add(out_THD.flatten(1), x_TH)
        normed = self.mlp_norm(x_TH)
        return self.down.add(self.up.mul(normed, self.gate.silu(normed)), x_TH)


class FusedDecoder:
    """Computes what the causal model that it was made from computes; shares its tensors and owns none."""

    def __init__(self, embedding: nn.Module, rotary: nn.Module, layers: list[_Layer], norm: _Norm, head: nn.Module):
        self._embedding, self._rotary, self._layers, self._norm, self._head = embedding, rotary, layers, norm, head

    def __call__(self, ids_T: Tensor, step: AttentionStep, sampled_N: Tensor) -> Tensor:
        """As attention.run_module: logits [N, V]."""
        x_TH: Tensor = self._embedding(ids_T)
        cos_1TD, sin_1TD = self._rotary(x_TH, position_ids=step.batch.positions_T[None])
        cos_TD, sin_TD = cos_1TD[0].contiguous(), sin_1TD[0].contiguous()
        for layer in self._layers:
            x_TH = layer(x_TH, cos_TD, sin_TD, step)
        logits: Tensor = self._head(self._norm(x_TH[sampled_N]))
        return logits


def is_known(module: nn.Module) -> bool:
    """Whether the model is of a family that `fuse` takes."""
    return type(module).__name__ in FAMILIES and type(module).__module__.startswith("transformers.models.")


def fuse(module: nn.Module, shapes: dict[int, LayerShape]) -> FusedDecoder | None:
    """The fused form of a loaded model whose attention's linears are merged and all packed, or None where it is of
    another kind. Gate and up stay apart: their activation and product are computed inside the linears.
    """
    if not is_known(module):
        return None
    base: Any = module.get_submodule("model")
    config = base.config
    layers = [_layer(layer, shapes[index]) for index, layer in enumerate(base.layers)]
    dims = {shape.head_dim for shape in shapes.values()}
    built = [layer for layer in layers if layer is not None]
    if len(built) != len(layers) or dims != {2 * base.rotary_emb.inv_freq.numel()} or config.hidden_act != "silu":
        return None
    return FusedDecoder(base.embed_tokens, base.rotary_emb, built, _norm(base.norm), module.get_submodule("lm_head"))


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _layer(layer: Any, shape: LayerShape) -> _Layer | None:
    attn, mlp = layer.self_attn, layer.mlp
    qkv = getattr(attn, "merged_q_k_v", None)
    linears: Any = (getattr(qkv, "linear", None), attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not isinstance(qkv, MergedLinear) or not all(isinstance(part, PackedLinear) for part in linears):
        return None
    head_norms = [_norm(getattr(attn, name)) if hasattr(attn, name) else None for name in ("q_norm", "k_norm")]
    return _Layer(
        index=attn.layer_idx,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        params=AttentionParams(attn.scaling, shape.window),
        norm=_norm(layer.input_layernorm),
        qkv=linears[0].op,
        query_norm=head_norms[0],
        key_norm=head_norms[1],
        out=linears[1].op,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=linears[2].op,
        up=linears[3].op,
        down=linears[4].op,
    )
