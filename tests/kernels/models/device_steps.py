"""Steps as tensors, made by hand: what the runner of a device makes on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.kernels.device.step import StepTensors
from diptych.kernels.model import LoadedModel
from diptych.kernels.models import DeviceDecoder
from diptych.kernels.ops.configs import Config
from diptych.kernels.ops.paged_attention import split
from diptych.kernels.ops.ragged import Segment

BLOCK = 4
NUM_BLOCKS = 60


def new_kv(model: LoadedModel, place: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Poisoned: what no token wrote must never be read."""
    shape = (NUM_BLOCKS, model.kv_heads, BLOCK, model.head_dim)
    dtype = getattr(torch, model.dtype)
    return [tuple(torch.full(shape, float("nan"), dtype=dtype, device=place) for _ in "kv") for _ in model.layer_ids]  # type: ignore[misc]


def step_of(
    model: LoadedModel,
    segments: Sequence[Segment],
    ids: Tensor,
    kept: Tensor,
    place: torch.device,
    *,
    by_kernels: bool = False,
) -> StepTensors:
    """Segments of one token come first. Slots are not the rows' numbers. `by_kernels`: with a work list, although the
    device be a CPU."""
    rows = len(segments)
    singles = sum(segment.num_tokens == 1 for segment in segments)
    assert all(segment.num_tokens == 1 for segment in segments[:singles])
    tokens = [(row, at, segment) for row, segment in enumerate(segments) for at in range(segment.start, segment.end)]

    def ints(numbers: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=place)

    blocks_SB = torch.zeros(rows + 2, 16, dtype=torch.int32, device=place)
    for row, segment in enumerate(segments):
        blocks_SB[rows - row, : len(segment.blocks)] = ints(list(segment.blocks))
    splits = None
    if place.type == "cuda" or by_kernels:
        splits = split.allocate(
            max_rows=max(8, rows),
            max_tokens=max(64, len(tokens)),
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            windows=model.windows,
            like=torch.empty(0, dtype=getattr(torch, model.dtype), device=place),
            prompts=Config(16, 16, 0, 0, 4, 2) if by_kernels else None,  # several tiles for few tokens
            invariant=model.deterministic,
        )
    step = StepTensors(
        ids_T=ids.int().to(place),
        positions_T=ints([at for _, at, _ in tokens]),
        slot_mapping_T=ints([one.blocks[at // BLOCK] * BLOCK + at % BLOCK for _, at, one in tokens], torch.int64),
        row_T=ints([row for row, _, _ in tokens]),
        query_start_R=ints([segment.first for segment in segments] + [len(tokens)]),
        seq_len_R=ints([segment.end for segment in segments]),
        slot_R=ints([rows - row for row in range(rows)]),
        blocks_SB=blocks_SB,
        kept_N=kept.long().to(place),
        flags_R=torch.zeros(rows, dtype=torch.int32, device=place),
        splits=splits,
        num_tokens=len(tokens),
        decode_rows=singles,
        prompt_rows=rows - singles,
        most_prompt=max((segment.num_tokens for segment in segments[singles:]), default=0),
        block_tokens=BLOCK,
    )
    split.plan_splits(step)
    return step


def layout(step: Sequence[tuple[int, int, int]]) -> list[Segment]:
    """(sequence, start, tokens) of each row; sequence s lies in blocks 10 s to 10 s + 9, backwards."""
    segments, first = [], 0
    for sequence, start, num in step:
        segments.append(Segment(first, num, start, tuple(reversed(range(10 * sequence, 10 * sequence + 10)))))
        first += num
    return segments


# Prompts, chunks of prompts behind a cached part, single tokens: longer than any window of the tiny models.
STEPS = (
    ((1, 0, 1), (0, 0, 13), (2, 0, 6), (3, 0, 13)),
    ((0, 13, 1), (2, 6, 1), (1, 1, 4), (3, 13, 17)),
    ((3, 30, 1), (0, 14, 1), (1, 5, 1), (2, 7, 1)),
)


def ids_of(count: int, salt: int) -> Tensor:
    return (torch.arange(count) * 31 + 7 * salt) % 509


def device_logits(model: LoadedModel, decoder: DeviceDecoder, place: torch.device) -> Tensor:
    """Of every second token of all steps, float32 on the CPU."""
    kv, found = new_kv(model, place), []
    for salt, rows in enumerate(STEPS):
        segments = layout(rows)
        count = sum(segment.num_tokens for segment in segments)
        kept = torch.arange(0, count, 2).flip(0)
        step = step_of(model, segments, ids_of(count, salt), kept, place)
        logits = torch.full((len(kept), model.vocab_size), float("nan"), dtype=kv[0][0].dtype, device=place)
        decoder.forward(step, kv, logits)
        assert not step.flags_R.any()
        found.append(logits.float().cpu())
    return torch.cat(found)
