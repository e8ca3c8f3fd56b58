"""Entry of qk_write and kv_store: check shapes, choose by device type. Letters as in reference.py; C positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..parts import Parts
from ..table import implementation
from .rope import RopeTable

if TYPE_CHECKING:
    from ...device.step import StepTensors


def qk_write(
    qkv: Tensor | Parts,
    rope: RopeTable,
    norms: tuple[Tensor, Tensor, float] | None,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    *,
    check: bool,
) -> Tensor:
    """Normalise (weights of a query's and a key's head, epsilon) and rotate the projection's queries and keys, store
    keys and values at `slot_mapping_T`; gives the queries [T, H, D] in the dtype of the blocks.

    `qkv` is [T, (H + 2 G) D]: queries, keys, values. A tensor is changed in place: the queries are a view of it, and
    where the step has prompts its keys become theirs, for attention over the step's own tokens (QkvView). Parts stay as
    they are: then the blocks alone hold the keys. All arithmetic in float32, rounded once. With `check` rows with a key
    or value that is not finite get KV_NOT_FINITE. Where the step's work list is invariant, the blocks alone hold the
    keys, and no bit depends on the number of tokens. ValueError: shapes or layouts that do not fit.
    """
    data = qkv.data[0] if isinstance(qkv, Parts) else qkv
    _, kv_heads, block_tokens, dim = k_NGBD.shape
    numbers = data.shape[1]
    if (
        data.shape[0] != step.num_tokens
        or numbers % dim
        or numbers // dim <= 2 * kv_heads
        or block_tokens != step.block_tokens
        or v_NGBD.shape != k_NGBD.shape
        or rope.rotated > dim
        or (norms is not None and not norms[0].shape == norms[1].shape == (dim,))
    ):
        raise ValueError(
            f"qk_write: a projection {tuple(data.shape)} of {step.num_tokens} tokens, {rope.rotated} rotated numbers "
            f"and norms {None if norms is None else (tuple(norms[0].shape), tuple(norms[1].shape))} do not fit blocks "
            f"{tuple(k_NGBD.shape)} of {step.block_tokens} tokens"
        )
    if isinstance(qkv, Tensor) and qkv.dtype is not k_NGBD.dtype:
        raise ValueError(f"qk_write: a projection in {qkv.dtype} for blocks in {k_NGBD.dtype}")
    if data.stride(1) != 1 or not (k_NGBD.is_contiguous() and v_NGBD.is_contiguous()):
        raise ValueError("qk_write: blocks and each row of the projection must be contiguous")
    module = implementation("qk_write", k_NGBD.device.type)
    return module.qk_write(qkv, rope, norms, k_NGBD, v_NGBD, step, check=check)  # type: ignore[no-any-return]


def kv_store(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, step: StepTensors, *, check: bool) -> None:
    """Store keys and values that are ready at `slot_mapping_T`; `check` as above. For models that rotate themselves."""
    wanted = (step.num_tokens, k_NGBD.shape[1], k_NGBD.shape[3])
    if k_TGD.shape != wanted or v_TGD.shape != wanted or k_NGBD.shape[2] != step.block_tokens:
        raise ValueError(
            f"kv_store: K {tuple(k_TGD.shape)} and V {tuple(v_TGD.shape)} of {step.num_tokens} tokens do not fit "
            f"blocks {tuple(k_NGBD.shape)} of {step.block_tokens} tokens"
        )
    module = implementation("qk_write", k_NGBD.device.type)
    module.kv_store(k_TGD, v_TGD, k_NGBD, v_NGBD, step, check=check)
