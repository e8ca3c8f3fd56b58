"""Steps over paged KV made from lengths alone, for tests and measurements of the ops that read them.

Blocks lie in random order, and what no sequence has written holds NaN, as after a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...device.step import StepTensors
from ..configs import Config
from .launch import QkvView
from .params import AttentionParams
from .split import allocate


@dataclass(frozen=True, slots=True, eq=False)
class PagedStep:
    """A step's tensors, T tokens; the keys and values of all its tokens lie in the blocks already."""

    qkv_TN: Tensor  # queries, keys, values of the new tokens
    k_NGBD: Tensor
    v_NGBD: Tensor
    step: StepTensors
    rows: tuple[tuple[int, int], ...]  # (tokens before the step, new tokens) of each row

    @property
    def q_THD(self) -> Tensor:
        """Queries, a view of the rows."""
        kv_heads, dim = self.k_NGBD.shape[1], self.k_NGBD.shape[3]
        heads = self.qkv_TN.shape[1] // dim - 2 * kv_heads
        return self.qkv_TN[:, : heads * dim].view(len(self.qkv_TN), heads, dim)

    @property
    def view(self) -> QkvView:
        """The new keys and values, views of the rows."""
        return QkvView.of(self.qkv_TN, self.k_NGBD.shape[1], self.k_NGBD.shape[3])


def paged_step(
    rows: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int],
    head_dim: int,
    block_tokens: int,
    like: Tensor,
    windows: Iterable[int | None] = (None,),
    limits: tuple[int, Config] | None = None,
    seed: int = 0,
) -> PagedStep:
    """`heads`: of queries, of keys. `like`: any tensor of the dtype and device. `limits`: programs wanted at once and
    the tile of prompts, where tests must see rows cut that would not be on a card.
    """
    device, dtype = like.device, like.dtype
    generator = torch.Generator(device).manual_seed(seed)
    decode_rows = next((at for at, (_, num) in enumerate(rows) if num > 1), len(rows))
    counts = [-(-(start + num) // block_tokens) for start, num in rows]
    total = sum(counts) + 3
    order = torch.randperm(total, generator=generator, device=device)
    shape = (total, heads[1], block_tokens, head_dim)
    k_NGBD, v_NGBD = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    table = torch.full((len(rows) + 2, max(counts) + 1), total - 1, dtype=torch.int32, device=device)
    slots = [len(rows) - at for at in range(len(rows))]  # not the rows' own order
    numbers = heads[0] + 2 * heads[1]
    tokens = sum(num for _, num in rows)
    qkv_TN = torch.randn(tokens, numbers * head_dim, generator=generator, device=device).to(dtype)
    news = QkvView.of(qkv_TN, heads[1], head_dim)
    mapping, first, used = [], 0, 0
    for (start, num), count, slot in zip(rows, counts, slots, strict=True):
        table[slot, :count] = order[used : used + count].int()
        used += count
        position = torch.arange(start + num, device=device)
        place = table[slot].long()[position // block_tokens] * block_tokens + position % block_tokens
        for pages, new in ((k_NGBD, news.k_TGD), (v_NGBD, news.v_TGD)):
            old = torch.randn(start, heads[1], head_dim, generator=generator, device=device).to(dtype)
            written = torch.cat((old, new[first : first + num]))
            pages[place // block_tokens, :, place % block_tokens] = written
        mapping.append(place[start:])
        first += num

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = [0]
    for _, num in rows:
        starts.append(starts[-1] + num)
    step = StepTensors(
        ids_T=torch.zeros(tokens, dtype=torch.int32, device=device),
        positions_T=ints([start + at for start, num in rows for at in range(num)]),
        slot_mapping_T=torch.cat(mapping),
        row_T=ints([row for row, (_, num) in enumerate(rows) for _ in range(num)]),
        query_start_R=ints(starts),
        seq_len_R=ints([start + num for start, num in rows]),
        slot_R=ints(slots),
        blocks_SB=table,
        kept_N=torch.arange(tokens, device=device),
        flags_R=torch.zeros(len(rows), dtype=torch.int32, device=device),
        splits=allocate(
            max_rows=len(rows),
            max_tokens=tokens,
            heads=heads[0],
            kv_heads=heads[1],
            head_dim=head_dim,
            windows=windows,
            like=k_NGBD,
            programs=limits[0] if limits else None,
            prompts=limits[1] if limits else None,
        ),
        num_tokens=tokens,
        decode_rows=decode_rows,
        prompt_rows=len(rows) - decode_rows,
        most_prompt=max([num for _, num in rows[decode_rows:]], default=0),
        block_tokens=block_tokens,
    )
    return PagedStep(qkv_TN, k_NGBD, v_NGBD, step, tuple(rows))


def exact(made: PagedStep, params: AttentionParams) -> Tensor:
    """The right answer in float64, [T, H, D], from the definition of softmax and the rows' lengths alone."""
    q_THD, step = made.q_THD.double(), made.step
    group = q_THD.shape[1] // made.k_NGBD.shape[1]
    found, first = [], 0
    for row, (start, num) in enumerate(made.rows):
        position = torch.arange(start + num, device=q_THD.device)
        blocks = step.blocks_SB[step.slot_R[row].long()].long()[position // step.block_tokens]
        k_HLD, v_HLD = (
            pages[blocks, :, position % step.block_tokens].double().repeat_interleave(group, 1).transpose(0, 1)
            for pages in (made.k_NGBD, made.v_NGBD)
        )
        scores = q_THD[first : first + num].transpose(0, 1) @ k_HLD.transpose(1, 2) * params.scaling
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        distance = position[start:, None] - position[None]
        hidden = (distance < 0) | (distance >= (params.window or start + num))
        weights = scores.masked_fill(hidden, float("-inf"))
        most = weights.amax(-1, keepdim=True)
        if params.sinks_H is not None:
            sink = params.sinks_H.double()[:, None, None]
            most = torch.maximum(most, sink)
        weights = torch.exp(weights - most)
        total = weights.sum(-1, keepdim=True)
        if params.sinks_H is not None:
            total = total + torch.exp(sink - most)
        found.append((weights / total @ v_HLD).transpose(0, 1))
        first += num
    return torch.cat(found)
