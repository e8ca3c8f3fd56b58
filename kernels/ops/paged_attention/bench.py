"""What is measured of attention: decoding and prompts of llama-8b's and other shapes; peers where installed.

Lengths, heads and block sizes that no engine's table is made for are here as well: none may fall far behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from ..cases import Case
from .launch import attend, plan_splits
from .params import AttentionParams
from .peers import decode_peers, prompt_peers
from .testing import PagedStep, paged_step

_Rows = Sequence[tuple[int, int]]
_LLAMA = ((32, 8), 128, 16)

_DECODE: dict[str, tuple[_Rows, tuple[tuple[int, int], int, int]]] = {
    "64 x 8192": ([(8191, 1)] * 64, _LLAMA),
    "64 x 1024": ([(1023, 1)] * 64, _LLAMA),
    "256 x 1024": ([(1023, 1)] * 256, _LLAMA),
    "64 x 256": ([(255, 1)] * 64, _LLAMA),
    "512 x 256": ([(255, 1)] * 512, _LLAMA),
    "512 x 256, 4 KV heads": ([(255, 1)] * 512, ((32, 4), 128, 16)),
    "1 x 256": ([(255, 1)], _LLAMA),
    "1 x 1024": ([(1023, 1)], _LLAMA),
    "1 x 8192": ([(8191, 1)], _LLAMA),
    "8 x 32768": ([(32_767, 1)] * 8, _LLAMA),
    "1 x 131072": ([(131_071, 1)], _LLAMA),
    "4 x 131072": ([(131_071, 1)] * 4, _LLAMA),
    "63 x 100 and 1 x 32768": ([(99, 1)] * 63 + [(32_767, 1)], _LLAMA),
    "100 .. 4000": ([(100 + 61 * at, 1) for at in range(64)], _LLAMA),
    "64 x 4096, head 64": ([(4095, 1)] * 64, ((32, 8), 64, 16)),
    "64 x 4096, head 80": ([(4095, 1)] * 64, ((32, 8), 80, 16)),
    "64 x 4096, head 96": ([(4095, 1)] * 64, ((32, 32), 96, 16)),
    "64 x 4096, head 256": ([(4095, 1)] * 64, ((16, 4), 256, 16)),
    "64 x 4096, 7 to one": ([(4095, 1)] * 64, ((28, 4), 128, 16)),
    "64 x 4096, no groups": ([(4095, 1)] * 64, ((16, 16), 128, 16)),
    "64 x 8192, 32 to one": ([(8191, 1)] * 64, ((32, 1), 128, 16)),
    "64 x 4096, blocks of 5": ([(4095, 1)] * 64, ((32, 8), 128, 5)),
    "64 x 4096, blocks of 64": ([(4095, 1)] * 64, ((32, 8), 128, 64)),
}
_PROMPTS: dict[str, tuple[_Rows, tuple[tuple[int, int], int, int]]] = {
    "1 x 2048": ([(0, 2048)], _LLAMA),
    "1 x 8192": ([(0, 8192)], _LLAMA),
    "1 x 32768": ([(0, 32_768)], _LLAMA),
    "64 x 128": ([(0, 128)] * 64, _LLAMA),
    "8 x 1024": ([(0, 1024)] * 8, _LLAMA),
    "1024 behind 31744": ([(31_744, 1024)], _LLAMA),
    "50 behind 8192": ([(8192, 50)], _LLAMA),
    "50 behind 100000": ([(100_000, 50)], _LLAMA),
    "4096 behind 126976": ([(126_976, 4096)], _LLAMA),
    "16 .. 1024": ([(0, 16 + 16 * at) for at in range(64)], _LLAMA),
    "1 x 4096, 7 to one": ([(0, 4096)], ((28, 4), 128, 16)),
    "1 x 8192, 32 to one": ([(0, 8192)], ((32, 1), 128, 16)),
    "1 x 4095, blocks of 5": ([(0, 4095)], ((32, 8), 128, 5)),
    "1 x 8192, head 64": ([(0, 8192)], ((32, 8), 64, 16)),
    "1 x 8192, head 80": ([(0, 8192)], ((32, 8), 80, 16)),
    "1 x 8192, head 256": ([(0, 8192)], ((16, 8), 256, 16)),
}
_MIXED = {"508 x 1088 and 4 x 1024": ([(1087, 1)] * 508 + [(0, 1024)] * 4, _LLAMA)}


def _inputs(rows: _Rows, shape: tuple[tuple[int, int], int, int], device: torch.device) -> tuple[PagedStep, Tensor]:
    heads, head_dim, block_tokens = shape
    like = torch.empty(0, device=device, dtype=torch.bfloat16)
    made = paged_step(rows, heads=heads, head_dim=head_dim, block_tokens=block_tokens, like=like)
    plan_splits(made.step)
    return made, torch.empty_like(made.q_THD).contiguous()


def _ours(scaling: float, blocks_only: bool, made: PagedStep, out_THD: Tensor) -> None:
    view = None if blocks_only else made.view
    attend(made.q_THD, view, made.k_NGBD, made.v_NGBD, made.step, AttentionParams(scaling), out_THD)


def _flop(rows: _Rows, heads: int, head_dim: int) -> int:
    """Products of each query with the keys it sees and with their values."""
    return sum(4 * heads * head_dim * (num * start + num * (num + 1) // 2) for start, num in rows)


def cases(device: torch.device) -> Iterator[Case]:
    """Decoding by bandwidth, prompts by arithmetic; in turn, so that a run that is ended early has some of each."""
    of_each = [[(table, name) for name in table] for table in (_DECODE, _PROMPTS, _MIXED)]
    for table, name in (case for turn in zip_longest(*of_each) for case in turn if case is not None):
        (rows, shape), counts_flop = table[name], table is _PROMPTS
        heads, head_dim, _ = shape
        tokens = sum(num for _, num in rows)
        kv_bytes = 4 * sum(start + num for start, num in rows) * heads[1] * head_dim
        run: Callable[..., object] = partial(_ours, head_dim**-0.5, False)
        alone = counts_flop and len(rows) == 1 and rows[0][0] == 0
        others = prompt_peers() if alone else decode_peers() if table is _DECODE else {}
        yield Case(
            name=f"{'prompts' if counts_flop else 'decode' if table is _DECODE else 'mixed'} {name}",
            make=partial(_inputs, rows, shape, device),
            run=run,
            size_bytes=kv_bytes + 4 * tokens * heads[0] * head_dim,
            flop=_flop(rows, heads[0], head_dim) if counts_flop else 0,
            peers=others,
        )
