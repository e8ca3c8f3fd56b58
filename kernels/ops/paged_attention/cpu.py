"""Paged attention on a CPU: prompts with equally many new tokens are gathered and batched; singles.py does the rest.

T tokens of the row, H query heads, G KV heads, R = H / G, D head size, N blocks, B tokens a block; S sequences of a
group, n new tokens, L padded context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..ragged import RaggedBatch, Segment
from .params import AttentionParams
from .reference import attend as attend
from .singles import Singles, can_attend


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that are attended together: equal n, contexts padded to the same number of blocks."""

    rows: Tensor | slice  # their tokens in the row, S * n of them
    gather: Tensor  # [S * G * blocks] rows of the arena seen as [N * G, B * D]
    segments: tuple[Segment, ...]
    num_new: int
    padded: int  # L

    @property
    def causal_only(self) -> bool:
        """Prompts from their beginning: the mask is the plain triangle, once L is cut to n."""
        return self.num_new > 1 and self.segments[0].start == 0


def paged_attention(
    q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch, params: AttentionParams
) -> Tensor:
    """See reference.py."""
    kv_heads = k_NGBD.shape[1]
    singles = batch.once("singles", lambda: Singles.find(batch)) if can_attend(q_THD, k_NGBD, v_NGBD) else None
    groups = batch.once(
        ("groups", kv_heads, singles is None),
        lambda: _plan(batch, kv_heads, q_THD.device, without_singles=singles is not None),
    )
    if singles is None and len(groups) == 1 and isinstance(groups[0].rows, slice):
        return _attend(q_THD, k_NGBD, v_NGBD, batch, groups[0], params)
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    if singles is not None:
        singles.attend(q_THD, out_THD, k_NGBD, v_NGBD, params)
    for group in groups:
        out_THD[group.rows] = _attend(q_THD[group.rows], k_NGBD, v_NGBD, batch, group, params)
    return out_THD


def _plan(batch: RaggedBatch, kv_heads: int, device: torch.device, *, without_singles: bool) -> list[_Group]:
    size = batch.block_tokens
    alike: dict[tuple[int, bool], list[Segment]] = {}
    for segment in batch.segments:
        if without_singles and segment.num_tokens == 1:
            continue
        alike.setdefault((segment.num_tokens, segment.start == 0), []).append(segment)
    groups: list[_Group] = []
    for members in alike.values():
        members.sort(key=lambda s: s.end)
        while members:
            # One group pads to at most twice its shortest context, plus four blocks: few calls, little waste.
            limit = 2 * members[0].end + 4 * size
            count = next((i for i, s in enumerate(members) if s.end > limit), len(members))
            groups.append(_group(members[:count], size, kv_heads, device))
            members = members[count:]
    return groups


def _group(members: list[Segment], size: int, kv_heads: int, device: torch.device) -> _Group:
    members.sort(key=lambda s: s.first)
    num_blocks = max(-(-segment.end // size) for segment in members)
    table = []
    for segment in members:
        used = -(-segment.end // size)
        # Padding repeats the sequence's own first block: always finite numbers, and already in the cache.
        table.append([*segment.blocks[:used], *[segment.blocks[0]] * (num_blocks - used)])
    table_Sb = torch.tensor(table, dtype=torch.int64, device=device)
    gather = (table_Sb[:, None, :] * kv_heads + torch.arange(kv_heads, device=device)[None, :, None]).reshape(-1)
    first, new = members[0].first, members[0].num_tokens
    rows: Tensor | slice = slice(first, first + new * len(members))
    if members[-1].first + new != first + new * len(members):  # others lie between
        starts = torch.tensor([s.first for s in members], device=device)
        rows = (starts[:, None] + torch.arange(new, device=device)).reshape(-1)
    return _Group(rows, gather, tuple(members), new, num_blocks * size)


def _mask(batch: RaggedBatch, group: _Group, window: int | None, like: Tensor) -> Tensor:
    """Additive mask [S, 1, n, L], made once per step, group and window."""

    def make() -> Tensor:
        starts_S = torch.tensor([s.start for s in group.segments])
        queries_Sn = starts_S[:, None] + torch.arange(group.num_new)
        distance_SnL = queries_Sn[:, :, None] - torch.arange(group.padded)
        hidden = distance_SnL < 0
        if window is not None:
            hidden |= distance_SnL >= window
        return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf"))[:, None]

    return batch.once(("mask", id(group), window, like.dtype), make)


def _attend(
    q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch, group: _Group, params: AttentionParams
) -> Tensor:
    num_blocks, kv_heads, size, dim = k_NGBD.shape
    seqs, new, padded = len(group.segments), group.num_new, group.padded
    heads = q_THD.shape[1]
    flat = (num_blocks * kv_heads, size * dim)
    k_SGLD = k_NGBD.view(flat).index_select(0, group.gather).view(seqs, kv_heads, padded, dim)
    v_SGLD = v_NGBD.view(flat).index_select(0, group.gather).view(seqs, kv_heads, padded, dim)
    if params.softcap is not None or params.sinks_H is not None:
        q_SHnD = q_THD.view(seqs, new, heads, dim).transpose(1, 2)
        return _dense(q_SHnD, k_SGLD, v_SGLD, _mask(batch, group, params.window, q_THD), params)
    if new == 1:
        # The query heads of a KV head stand where the kernel expects query positions: no copy of K and V per head.
        q_SGRD = q_THD.view(seqs, kv_heads, heads // kv_heads, dim)
        mask = _mask(batch, group, params.window, q_THD)
        out = scaled_dot_product_attention(q_SGRD, k_SGLD, v_SGLD, attn_mask=mask, scale=params.scaling)
        return out.reshape(seqs, heads, dim)
    q_SHnD = q_THD.view(seqs, new, heads, dim).transpose(1, 2)
    gqa = heads != kv_heads
    if group.causal_only and params.window is None:
        k_SGLD, v_SGLD = k_SGLD[:, :, :new], v_SGLD[:, :, :new]
        out = scaled_dot_product_attention(q_SHnD, k_SGLD, v_SGLD, is_causal=True, scale=params.scaling, enable_gqa=gqa)
    else:
        mask = _mask(batch, group, params.window, q_THD)
        out = scaled_dot_product_attention(q_SHnD, k_SGLD, v_SGLD, attn_mask=mask, scale=params.scaling, enable_gqa=gqa)
    return out.transpose(1, 2).reshape(seqs * new, heads, dim)


def _dense(q_SHnD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor, mask_S1nL: Tensor, params: AttentionParams) -> Tensor:
    """For layers with a softcap or sinks, which torch's fused attention does not know."""
    seqs, heads, new, dim = q_SHnD.shape
    kv_heads = k_SGLD.shape[1]
    q = q_SHnD.reshape(seqs, kv_heads, heads // kv_heads, new, dim).float()
    scores = q @ k_SGLD[:, :, None].float().transpose(-1, -2) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores + mask_S1nL[:, :, None]
    if params.sinks_H is not None:
        sinks = params.sinks_H.float().view(1, kv_heads, heads // kv_heads, 1, 1).expand(seqs, -1, -1, new, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k_SGLD.shape[2]]
    out = (weights @ v_SGLD[:, :, None].float()).reshape(seqs, heads, new, dim)
    return out.transpose(1, 2).reshape(seqs * new, heads, dim).to(q_SHnD.dtype)
