"""The hand-written decoder: 9 launches a layer on a card (10 where experts sort pairs), none for a residual add.

x -> norm -> qkv -> qk_write -> attend -> out (+ x) -> norm -> gate, up -> silu_mul -> down (+ x) -> next norm
What a linear or the experts add to the residual comes as parts, which the next norm adds, or is added inside the
product. The last layer's second half is computed for the tokens whose logits are wanted alone. A deterministic one
uses one layout of each op for any number of tokens, so that no bit of a token depends on what else a step computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device.step import StepTensors
from ..ops.add_norm.launch import add_norm
from ..ops.linear.launch import pack, pack_invariant
from ..ops.linear.reference import Linear
from ..ops.moe.experts import Experts, MoeWorkspace
from ..ops.moe.launch import moe
from ..ops.paged_attention.launch import QkvView, attend
from ..ops.paged_attention.params import AttentionParams
from ..ops.paged_attention.split import is_invariant
from ..ops.parts import Parts
from ..ops.qk_write.launch import qk_write
from ..ops.qk_write.rope import RopeTable
from ..ops.silu_mul.launch import silu_mul
from .shape import DecoderShape
from .tensors import DecoderTensors, LayerTensors


@dataclass(slots=True, eq=False)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    head_norms: tuple[Tensor, Tensor, float] | None  # of queries and keys, epsilon
    params: AttentionParams
    out: Linear
    mlp_norm: Tensor
    mlp: tuple[Linear, Linear] | Experts  # gate and up as one, down


class _Buffers:
    """What lies between two ops of a step of up to T tokens; every layer uses the same."""

    def __init__(self, shape: DecoderShape, like: Tensor, max_tokens: int) -> None:
        def rows(size: int) -> Tensor:
            return torch.empty(max_tokens, size, dtype=like.dtype, device=like.device)

        heads = shape.heads * shape.head_dim
        inner = 0 if all(shape.sparse) else shape.intermediate
        self.residual, self.normed = rows(shape.hidden), rows(shape.hidden)
        self.qkv, self.attended = rows(heads + 2 * shape.kv_heads * shape.head_dim), rows(heads)
        self.gate_up, self.inner = rows(2 * inner), rows(inner)


class Decoder:
    """Computes a DeviceDecoder's forward with the weights of `tensors`, which it shares. See DeviceDecoder."""

    def __init__(
        self,
        shape: DecoderShape,
        tensors: DecoderTensors,
        rope: RopeTable,
        *,
        max_tokens: int,
        capturable: bool = True,
        deterministic: bool = False,
    ) -> None:
        self.capturable = capturable
        self._deterministic = deterministic
        self._shape, self._rope, self.max_tokens = shape, rope, max_tokens
        self._embedding, self._norm = tensors.embedding, tensors.norm
        packed = pack_invariant if deterministic else pack
        self._head = packed(tensors.head, None)
        self._layers = [
            _layer(shape, layer, window, packed) for layer, window in zip(tensors.layers, shape.windows, strict=True)
        ]
        self._buffers = _Buffers(shape, tensors.embedding, max_tokens)
        sparse = [layer.mlp for layer in self._layers if isinstance(layer.mlp, Experts)]
        self._workspace = MoeWorkspace(sparse[0], max_tokens=max_tokens, invariant=deterministic) if sparse else None

    def forward(self, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]], logits_NV: Tensor) -> None:
        """See DeviceDecoder. ValueError: more tokens than there is room for, or a work list of the other kind."""
        tokens = step.num_tokens
        if tokens > self.max_tokens or len(kv) != len(self._layers):
            raise ValueError(f"decoder: {tokens} tokens of at most {self.max_tokens}, KV of {len(kv)} layers")
        if self._deterministic != is_invariant(step):
            raise ValueError(f"decoder: deterministic is {self._deterministic}, of the step's work list it is not")
        residual, normed = self._buffers.residual[:tokens], self._buffers.normed[:tokens]
        torch.index_select(self._embedding, 0, step.ids_T[:tokens], out=residual)
        parts: Parts | None = None
        for layer, pair in zip(self._layers[:-1], kv[:-1], strict=True):
            self._norm_of(residual, parts, layer.input_norm, normed)
            attended = self._attention(layer, normed, pair, step, check=False)
            parts = self._second_half(layer, attended, residual, normed)
        last = self._layers[-1]
        self._norm_of(residual, parts, last.input_norm, normed)
        attended = self._attention(last, normed, kv[-1], step, check=True)
        wanted = step.kept_N.shape[0]
        if wanted == 0:
            return
        residual = residual.index_select(0, step.kept_N)
        normed = torch.empty_like(residual)
        parts = self._second_half(last, attended.index_select(0, step.kept_N), residual, normed)
        self._norm_of(residual, parts, self._norm, normed)
        self._head.write(normed, logits_NV)

    def _attention(
        self, layer: _Layer, normed: Tensor, pair: tuple[Tensor, Tensor], step: StepTensors, *, check: bool
    ) -> Tensor:
        """Attention's result before its projection, [T, H * D]; keys and values are stored on the way."""
        shape, tokens = self._shape, normed.shape[0]
        qkv: Tensor | Parts | None = layer.qkv.parts(normed)
        view: QkvView | None = None
        if qkv is None:
            qkv = layer.qkv.write(normed, self._buffers.qkv[:tokens])
            view = None if step.is_decode or self._deterministic else QkvView.of(qkv, shape.kv_heads, shape.head_dim)
        q_THD = qk_write(qkv, self._rope, layer.head_norms, *pair, step, check=check)
        attended = self._buffers.attended[:tokens]
        out_THD = attended.view(tokens, shape.heads, shape.head_dim)
        attend(q_THD, view, *pair, step, layer.params, out_THD)
        return attended

    def _second_half(self, layer: _Layer, attended: Tensor, residual: Tensor, normed: Tensor) -> Parts | None:
        """Attention's projection and the MLP. What the MLP adds to the residual is in it already where None comes."""
        tokens = residual.shape[0]
        self._norm_of(residual, _onto(layer.out, attended, residual), layer.mlp_norm, normed)
        if isinstance(layer.mlp, Experts):
            assert self._workspace is not None
            return moe(normed, layer.mlp, self._workspace)
        wide, down = layer.mlp
        gate_up: Tensor | Parts | None = wide.parts(normed)
        if gate_up is None:
            gate_up = wide.write(normed, self._buffers.gate_up[:tokens])
        return _onto(down, silu_mul(gate_up, self._buffers.inner[:tokens]), residual)

    def _norm_of(self, residual: Tensor, parts: Parts | None, weight: Tensor, out: Tensor) -> None:
        add_norm(residual, parts, weight, self._shape.eps, out, invariant=self._deterministic)


def _onto(linear: Linear, x: Tensor, residual: Tensor) -> Parts | None:
    """residual += linear(x): done, or as parts to be added."""
    parts = linear.parts(x)
    if parts is None:
        linear.into(x, residual)
    return parts


_Pack = Callable[[Tensor, Tensor | None], Linear]


def _layer(shape: DecoderShape, tensors: LayerTensors, window: int | None, packed: _Pack) -> _Layer:
    norms = None
    if tensors.query_norm is not None and tensors.key_norm is not None:
        norms = (tensors.query_norm, tensors.key_norm, shape.eps)
    mlp: tuple[Linear, Linear] | Experts
    if tensors.router is not None:
        assert shape.experts is not None
        sizes = shape.experts
        mlp = Experts(tensors.router, tensors.gate_up, tensors.down, sizes.top_k, sizes.renormalise)
    else:
        mlp = (packed(tensors.gate_up, tensors.gate_up_bias), packed(tensors.down, tensors.down_bias))
    return _Layer(
        input_norm=tensors.input_norm,
        qkv=packed(tensors.qkv, tensors.qkv_bias),
        head_norms=norms,
        params=AttentionParams(shape.head_dim**-0.5, window),
        out=packed(tensors.out, tensors.out_bias),
        mlp_norm=tensors.mlp_norm,
        mlp=mlp,
    )
