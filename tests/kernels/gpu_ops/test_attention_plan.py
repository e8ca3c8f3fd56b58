"""The work list of a step: every key of every row belongs to exactly one item, whatever the lengths."""

from __future__ import annotations

import random

import pytest
import torch

from diptych.kernels.ops.configs import Config
from diptych.kernels.ops.paged_attention import cuda
from diptych.kernels.ops.paged_attention.split import COUNTS, MOST_ITEMS, RECORD, allocate, most_items
from diptych.kernels.ops.paged_attention.testing import PagedStep, paged_step

TILE = Config(16, 16, 0, 0, 4, 2)


def planned(
    rows: list[tuple[int, int]], windows: tuple[int | None, ...], place: torch.device, programs: int
) -> PagedStep:
    made = paged_step(
        rows,
        heads=(4, 2),
        head_dim=8,
        block_tokens=64,
        like=torch.empty(0, device=place, dtype=torch.float16),
        windows=windows,
        limits=(programs, TILE),
    )
    assert made.step.splits is not None
    cuda.plan(made.step, made.step.splits)
    return made


def records(work: torch.Tensor) -> list[list[int]]:
    count = int(work[0])
    return work[COUNTS : COUNTS + RECORD * count].view(count, RECORD).tolist()


@pytest.mark.parametrize("programs", [1, 8, 64])
@pytest.mark.parametrize("seed", range(4))
def test_each_visible_key_of_a_decoding_row_is_in_one_item(seed: int, programs: int, place: torch.device) -> None:
    chance = random.Random(seed)
    most = [1, 80, 700, 5000][seed]
    rows = [(chance.randrange(most), 1) for _ in range(chance.randint(1, 9))]
    windows = (None, 1, 100)
    step = planned(rows, windows, place, programs).step
    splits = step.splits
    assert splits is not None
    assert splits.windows == (0, 1, 100)
    for window, work in zip(splits.windows, splits.rows_of, strict=True):
        items = records(work)
        assert len(items) <= most_items(len(rows), splits.slots)
        at = 0
        for row, (start, _) in enumerate(rows):
            end = start + 1
            next_key = max(0, end - window) if window else 0
            count = items[at][5]
            assert 1 <= count <= MOST_ITEMS
            for index in range(count):
                assert items[at][:6] == [row, int(step.slot_R[row]), next_key, items[at][3], index, count]
                assert items[at][3] > next_key
                next_key = items[at][3]
                at += 1
            assert next_key == end
        assert at == len(items)


@pytest.mark.parametrize("programs", [1, 64, 4000])
def test_each_tile_of_a_prompt_is_there_once_in_all_its_pieces(programs: int, place: torch.device) -> None:
    rows = [(9, 1), (0, 40), (1000, 16), (300, 1), (5000, 33), (0, 2)]
    step = planned(rows, (None,), place, programs).step
    assert step.splits is not None
    items = records(step.splits.tiles_X)
    at, first, tile = 0, 1, 0
    for row, (start, num) in enumerate(rows[1:], 1):
        for offset in reversed(range(0, num, TILE.block_m)):
            count = items[at][6]
            assert count == 1 or (programs > 1 and start >= count * 256)
            for piece in range(count):
                assert items[at] == [int(step.slot_R[row]), first, num, start, offset, piece, count, tile]
                at += 1
            tile += 1
        first += num
    assert at == len(items)
    assert len(items) <= max(tile, programs // 4)
    if programs == 4000:
        assert len(items) > tile  # the long prefixes are cut


def test_a_row_a_little_longer_than_its_share_is_not_cut(place: torch.device) -> None:
    """64 rows of 1,024 tokens and 528 programs of 8 KV heads: 993 tokens each. Cut in two they took 20 % longer."""
    splits = allocate(
        max_rows=64,
        max_tokens=64,
        heads=32,
        kv_heads=8,
        head_dim=8,
        windows=(None,),
        like=torch.empty(0, device=place),
        programs=528,
        prompts=TILE,
    )
    assert splits.slots == 66
    step = planned([(1023, 1)] * 3, (None,), place, 8).step
    wide = step.splits
    assert wide is not None
    assert wide.slots == 4  # 3,072 keys: 768 a slot
    assert [record[5] for record in records(wide.rows_of[0])] == [1, 1, 1]
