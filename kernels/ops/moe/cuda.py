"""The sparse layer on a card: route, align (only where tokens are many), gate and up with silu, down: 3 or 4 launches.

Tile sizes depend on how many pairs an expert gets on average: a block of pairs reads its expert's weights once, so it
should hold all pairs of an expert as long as reading, not computing, takes the time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled import launch
from ..configs import Config, choose
from ..parts import Parts
from .experts import LARGEST_BLOCK, Experts, MoeWorkspace, router_tiling
from .experts_kernel import experts as experts_kernel
from .route_kernel import align, route

UP_OP, DOWN_OP = "moe_up", "moe_down"  # shapes: (16 * pairs / experts, outs, ins)
FEW = 16  # tokens up to which a block is a pair; the smallest tile of a matrix product
BLOCKS_FIRST = 1  # as a configuration's `split`: programs are ordered by block of pairs first
_INVARIANT = Config(16, 64, 64, 0, 4, 3)
_FLOAT32_TILES = {UP_OP: 64, DOWN_OP: 128}  # outputs at most: wider tiles spill, and fit no multiprocessor


class Call(NamedTuple):
    """One pass of `tokens` tokens through a layer."""

    experts: Experts
    workspace: MoeWorkspace
    tokens: int
    few: bool  # no more tokens than a block has rows: pairs need not be sorted

    @property
    def pairs(self) -> int:
        """T * K."""
        return self.tokens * self.experts.top_k


def moe(x_TH: Tensor, experts: Experts, workspace: MoeWorkspace) -> Parts:
    """See launch.py."""
    tokens = x_TH.shape[0]
    call = Call(experts, workspace, tokens, tokens <= FEW and not workspace.invariant)
    up, down = configurations(call)
    try:
        choose_experts(call, x_TH)
        if not call.few:
            sort_pairs(call, up.block_m)
        project(call, up, x_TH, workspace.inner_PI, first=True)
        project(call, down, workspace.inner_PI, workspace.out_PH, first=False)
    except Exception:  # a kernel that cannot be compiled, say: what was counted must not reach the next call
        workspace.clear()
        raise
    out_KTH = workspace.out_PH[: call.pairs].view(experts.top_k, tokens, experts.hidden)
    return Parts(out_KTH, experts.top_k)


def configurations(call: Call) -> tuple[Config, Config]:
    """Of both projections; their blocks of pairs are the same."""
    if call.workspace.invariant:
        return _INVARIANT, _INVARIANT
    load = max(1, 16 * call.pairs // call.experts.num_experts)
    hidden, inner = call.experts.hidden, call.experts.intermediate
    numbers = call.experts.gate_up_EIH.element_size()
    up, down = fitting(UP_OP, (load, inner, hidden), numbers), fitting(DOWN_OP, (load, hidden, inner), numbers)
    rows = FEW if call.few else up.block_m
    assert FEW <= rows <= LARGEST_BLOCK
    return up._replace(block_m=rows), down._replace(block_m=rows)


def fitting(op: str, shape: tuple[int, int, int], number_bytes: int) -> Config:
    """The table's row, which is for 16-bit numbers; float32 is computed without tensor cores, in smaller tiles."""
    found = choose(op, shape)
    if number_bytes == 2:
        return found
    tile = min(found.block_n, _FLOAT32_TILES[op])
    return found._replace(block_n=tile, block_k=found.block_k // 2, stages=min(found.stages, 3))


def choose_experts(call: Call, x_TH: Tensor) -> None:
    """Fill `ids_P` and `weights_P`; where pairs are to be sorted, add up those of each expert in `counts_E`."""
    experts, space = call.experts, call.workspace
    num, hidden = experts.num_experts, experts.hidden
    block, split = router_tiling(call.tokens, num, invariant=space.invariant)
    wide = max(16, _power(num))
    step = min(max(16, min(128, 8192 // wide)), max(16, _power(hidden)))
    steps = -(-hidden // step)
    span = -(-steps // split) * step
    launch(
        route,
        (-(-call.tokens // block), split, 1),
        (
            x_TH,
            experts.router_EH,
            space.partial,
            space.arrived,
            space.ids_P,
            space.weights_P,
            space.counts_E,
            call.tokens,
        ),
        num_warps=8 if block * wide >= 2048 else 4,
        num_stages=3,
        H=hidden,
        E=num,
        BE=wide,
        TOP=experts.top_k,
        KP=_power(experts.top_k),
        RENORM=experts.renormalise,
        COUNT=not call.few,
        BT=block,
        BK=step,
        SPLIT=split,
        SPAN=span,
        PRECISION=_precision(x_TH),
    )


def sort_pairs(call: Call, block: int) -> None:
    """Fill `pairs`, `expert_of` and `num_blocks` from the ids and counts, which are cleared."""
    space, num = call.workspace, call.experts.num_experts
    launch(
        align,
        (num, 1, 1),
        (
            space.ids_P,
            space.counts_E,
            space.aligned,
            space.pairs,
            space.expert_of,
            space.num_blocks,
            call.pairs,
        ),
        num_warps=4 if block == FEW else 8,
        num_stages=1,
        E=num,
        BE=max(16, _power(num)),
        BM=block,
        CHUNK=1024 if block == FEW else 4096,  # by the block, so that no other number of tokens is another variant
    )


def project(call: Call, config: Config, x: Tensor, y: Tensor, *, first: bool) -> None:
    """Gate and up with silu from the tokens to the pairs (`first`), or down with the routing weights from the pairs."""
    experts, space = call.experts, call.workspace
    weight = experts.gate_up_EIH if first else experts.down_EHI
    outs, ins = (experts.intermediate, experts.hidden) if first else (experts.hidden, experts.intermediate)
    rows = config.block_m
    blocks = call.pairs if call.few else min(call.pairs, experts.num_experts) + call.pairs // rows
    tile, step = min(config.block_n, max(16, _power(outs))), min(config.block_k, max(16, _power(ins)))
    tiles = -(-outs // tile)
    launch(
        experts_kernel,
        (blocks, tiles, 1) if config.split == BLOCKS_FIRST else (tiles, blocks, 1),
        (
            x,
            weight,
            y,
            space.weights_P,
            space.ids_P,
            space.pairs,
            space.expert_of,
            space.num_blocks,
            call.tokens,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        N=outs,
        K=ins,
        TOP=experts.top_k,
        KP=_power(experts.top_k),
        UP=first,
        FEW=call.few,
        BLOCKS_FIRST=config.split == BLOCKS_FIRST,
        BM=rows,
        BN=tile,
        BK=step,
        EVEN_N=outs % tile == 0,
        EVEN_K=ins % step == 0,
        PRECISION=_precision(x),
    )


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype is torch.float32 else "tf32"
