"""Paged attention on a card: launches of the Triton kernels over a step's work list. Letters as in reference.py.

What no kernel takes (launch.refusal) is computed by the definition, slowly: whoever loads a model says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiled import launch
from ..configs import Config, choose
from . import reference
from .decode_kernel import attend_rows
from .invariant_kernel import attend_tiles, plan_pieces
from .launch import QkvView, refusal
from .params import AttentionParams
from .plan_kernel import plan_rows, plan_tiles
from .prompt_kernel import attend_prompts
from .reference import paged_attention as paged_attention
from .split import COUNTS, MOST_ITEMS, RECORD, Splits, group_tile, most_items

if TYPE_CHECKING:
    from ...device.step import StepTensors

_LOG2_E = math.log2(math.e)
_UNIT = 64  # tokens by which items of a row are measured
_LEAST, _LEAST_ALONE = 256, 128  # of an item; one H200: 64 x 1,024 81 us with 128, 66 with 256; 1 x 1,024 9.6 and 8.3
_ENOUGH = 1024  # tokens: items of it are cut no further for one round of programs
_MOST_PIECES = 16
_STORED_AT_ONCE = 32
_SPAN = 32  # tiles of keys in a piece of an invariant tile; another number would change bits


def plan(step: StepTensors, splits: Splits) -> None:
    """See split.plan_splits."""
    if step.num_rows > splits.max_rows:
        raise ValueError(f"a step of {step.num_rows} rows, but the work list has room for {splits.max_rows}")
    block = max(16, 1 << (splits.max_rows - 1).bit_length())
    if splits.invariant:
        launch(
            plan_pieces,
            (step.num_rows, 1, 1),
            (step.query_start_R, step.seq_len_R, step.slot_R, splits.tiles_X, step.num_rows),
            COUNTS=COUNTS,
            RECORD=RECORD,
            ROOM=splits.room,
            SPAN=_SPAN * splits.prompts.block_n,
            TILE=splits.tile_tokens,
            BLOCK=block,
            STORE=_STORED_AT_ONCE,
        )
        return
    launch(
        plan_rows,
        (step.decode_rows, len(splits.windows), 1),
        (step.seq_len_R, step.slot_R, splits.windows_W, splits.rows_WX, step.decode_rows),
        WORK=splits.rows_WX.shape[1],
        COUNTS=COUNTS,
        RECORD=RECORD,
        SLOTS=splits.slots,
        MOST=MOST_ITEMS,
        LEAST=_LEAST,
        LEAST_ALONE=_LEAST_ALONE,
        ENOUGH=_ENOUGH,
        UNIT=_UNIT,
        BLOCK=block,
        STORE=_STORED_AT_ONCE,
    )
    launch(
        plan_tiles,
        (step.prompt_rows, 1, 1),
        (step.query_start_R, step.seq_len_R, step.slot_R, splits.tiles_X, step.decode_rows, step.prompt_rows),
        COUNTS=COUNTS,
        RECORD=RECORD,
        HEADS=splits.heads,
        PROGRAMS=splits.programs,
        MOST=_MOST_PIECES,
        LEAST=_LEAST,
        TILE=splits.tile_tokens,
        BLOCK=block,
        STORE=_STORED_AT_ONCE,
    )


def attend(
    q_THD: Tensor,
    qkv: QkvView | None,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    params: AttentionParams,
    out_THD: Tensor,
) -> None:
    """See launch.py. The step's work list must have been filled."""
    splits = step.splits
    if splits is None or refusal(q_THD.shape[2], q_THD.dtype) is not None:
        reference.attend(q_THD, qkv, k_NGBD, v_NGBD, step, params, out_THD)
        return
    if q_THD.shape[1] > splits.heads or (params.window or 0) not in splits.windows:
        raise ValueError(
            f"attend: {q_THD.shape[1]} heads, window {params.window}, but the work list is for {splits.heads} "
            f"heads and windows {splits.windows}"
        )
    if splits.invariant:
        invariant(q_THD, k_NGBD, v_NGBD, step, splits, params, out_THD)
        return
    if step.decode_rows:
        config = choose("attend_rows", (step.decode_rows, q_THD.shape[2], q_THD.element_size()))
        rows(q_THD, k_NGBD, v_NGBD, step, splits, params, out_THD, config=config)
    if step.prompt_rows:
        prompts(q_THD, qkv, k_NGBD, v_NGBD, step, splits, params, out_THD)


def rows(
    q_THD: Tensor,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    splits: Splits,
    params: AttentionParams,
    out_THD: Tensor,
    *,
    config: Config,
) -> None:
    """The first `decode_rows` tokens, each a row."""
    _, heads, dim = q_THD.shape
    kv_heads = k_NGBD.shape[1]
    group = heads // kv_heads
    held, share = group_tile(group)
    wide = max(16, 1 << (dim - 1).bit_length())
    scale, factor = _factors(params)
    launch(
        attend_rows,
        (most_items(step.decode_rows, splits.slots), kv_heads * share, 1),
        (
            q_THD,
            k_NGBD,
            v_NGBD,
            out_THD,
            out_THD if params.sinks_H is None else params.sinks_H,
            step.blocks_SB,
            splits.rows_of[splits.windows.index(params.window or 0)],
            splits.parts,
            splits.lse,
            splits.tickets,
            scale,
            factor,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        GROUP=group,
        G=kv_heads,
        D=dim,
        WIDE=wide,
        Q_ROW=q_THD.stride(0),
        Q_HEAD=q_THD.stride(1),
        TABLE=step.blocks_SB.stride(0),
        PAGE=step.block_tokens,
        COUNTS=COUNTS,
        RECORD=RECORD,
        TILE=config.block_n,
        HELD=held,
        SHARE=share,
        SOFTCAP=params.softcap is not None,
        SINKS=params.sinks_H is not None,
        PRECISION=_precision(q_THD),
    )


def prompts(
    q_THD: Tensor,
    qkv: QkvView | None,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    splits: Splits,
    params: AttentionParams,
    out_THD: Tensor,
) -> None:
    """The tokens behind, in rows of any number of them."""
    _, heads, dim = q_THD.shape
    kv_heads = k_NGBD.shape[1]
    config = splits.prompts
    scale, factor = _factors(params)
    k_new, v_new, k_tiles, v_tiles = _new_rows(qkv, k_NGBD, v_NGBD, config.block_n)
    tiles = -(-(step.num_tokens - step.decode_rows) // config.block_m) + step.prompt_rows
    launch(
        attend_prompts,
        (max(tiles, splits.programs // splits.heads), heads, 1),
        (
            q_THD,
            k_new,
            v_new,
            k_tiles,
            v_tiles,
            k_NGBD,
            v_NGBD,
            out_THD,
            out_THD if params.sinks_H is None else params.sinks_H,
            step.blocks_SB,
            splits.tiles_X,
            splits.parts,
            splits.lse,
            splits.tickets,
            scale,
            factor,
            params.window or 0,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        H=heads,
        G=kv_heads,
        D=dim,
        WIDE=max(16, 1 << (dim - 1).bit_length()),
        Q_ROW=q_THD.stride(0),
        Q_HEAD=q_THD.stride(1),
        NEW_ROW=k_new.stride(0),
        NEW_HEAD=k_new.stride(1),
        TABLE=step.blocks_SB.stride(0),
        PAGE=step.block_tokens,
        COUNTS=COUNTS,
        RECORD=RECORD,
        BM=config.block_m,
        BN=config.block_n,
        NEW=qkv is not None,
        TMA=k_tiles is not None,
        WINDOWED=params.window is not None,
        SOFTCAP=params.softcap is not None,
        SINKS=params.sinks_H is not None,
        PRECISION=_precision(q_THD),
    )


def invariant(
    q_THD: Tensor,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    splits: Splits,
    params: AttentionParams,
    out_THD: Tensor,
) -> None:
    """All rows, by the kernel whose bits depend on a row's own tokens alone."""
    _, heads, dim = q_THD.shape
    kv_heads = k_NGBD.shape[1]
    group = heads // kv_heads
    config = splits.prompts
    held = config.block_m // splits.tile_tokens
    share = -(-group // held)
    scale, factor = _factors(params)
    launch(
        attend_tiles,
        (-(-step.num_tokens // splits.tile_tokens) + step.num_rows + splits.room, kv_heads * share, 1),
        (
            q_THD,
            k_NGBD,
            v_NGBD,
            out_THD,
            out_THD if params.sinks_H is None else params.sinks_H,
            step.blocks_SB,
            splits.tiles_X,
            splits.parts,
            splits.lse,
            splits.tickets,
            scale,
            factor,
            params.window or 0,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        GROUP=group,
        G=kv_heads,
        D=dim,
        WIDE=max(16, 1 << (dim - 1).bit_length()),
        Q_ROW=q_THD.stride(0),
        Q_HEAD=q_THD.stride(1),
        TABLE=step.blocks_SB.stride(0),
        PAGE=step.block_tokens,
        COUNTS=COUNTS,
        RECORD=RECORD,
        BM=config.block_m,
        BN=config.block_n,
        SPAN=_SPAN * config.block_n,
        HELD=held,
        SHARE=share,
        WINDOWED=params.window is not None,
        SOFTCAP=params.softcap is not None,
        SINKS=params.sinks_H is not None,
        PRECISION=_precision(q_THD),
    )


def _new_rows(qkv: QkvView | None, k_NGBD: Tensor, v_NGBD: Tensor, keys: int) -> tuple[Tensor, Tensor, Any, Any]:
    """Keys and values of the step's tokens, alike in their strides, and descriptors of them where TMA can read them."""
    if qkv is None:
        return k_NGBD, v_NGBD, None, None
    k_TGD, v_TGD = qkv
    if k_TGD.stride() != v_TGD.stride() or k_TGD.stride(2) != 1:
        k_TGD, v_TGD = k_TGD.contiguous(), v_TGD.contiguous()
    tokens, kv_heads, dim = k_TGD.shape
    row, head = k_TGD.stride(0), k_TGD.stride(1)
    fits = k_TGD.element_size() == 2 and dim & (dim - 1) == 0 and dim >= 64 and row % 8 == 0 and head % 8 == 0
    if not fits or not k_TGD.is_cuda or (k_TGD.data_ptr() | v_TGD.data_ptr()) % 16:
        return k_TGD, v_TGD, None, None
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [tokens, (kv_heads - 1) * head + dim]
    found = [TensorDescriptor(part, shape, [row, 1], [keys, dim]) for part in (k_TGD, v_TGD)]
    return k_TGD, v_TGD, found[0], found[1]


def _factors(params: AttentionParams) -> tuple[float, float]:
    """(what scores are multiplied by before exp2, what they are before tanh)."""
    if params.softcap is None:
        return params.scaling * _LOG2_E, 1.0
    return params.softcap * _LOG2_E, params.scaling / params.softcap


def _precision(tensor: Tensor) -> str:
    """float32 is computed as such, not in tf32: the conformance of a model is judged in it."""
    return "ieee" if tensor.dtype is torch.float32 else "tf32"
