"""The tensors of one sparse layer, and the memory that all sparse layers of a model share while they compute.

T tokens, K experts a token (top_k), E experts, H hidden size, I intermediate size of an expert; a pair is one token
with one of its experts, numbered token * K + rank of the expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_BLOCK = 128  # pairs that one program computes at most
_PROCESSORS = 132  # of an H100 or H200; a card with others is filled less well, not less rightly


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A router and its experts: SiLU-gated MLPs without biases. All contiguous, of one dtype, on one device."""

    router_EH: Tensor
    gate_up_EIH: Tensor  # [E, 2 * I, H]: an expert's gate, then its up projection
    down_EHI: Tensor  # [E, H, I]
    top_k: int
    renormalise: bool  # weights of the chosen experts add up to 1; else they are their softmax over all experts

    def __post_init__(self) -> None:
        num, hidden = self.router_EH.shape
        wide = self.gate_up_EIH.shape[1]
        if (
            wide % 2
            or self.gate_up_EIH.shape != (num, wide, hidden)
            or self.down_EHI.shape != (num, hidden, wide // 2)
            or not 0 < self.top_k <= num
        ):
            raise ValueError(
                f"experts: router {tuple(self.router_EH.shape)}, gate and up {tuple(self.gate_up_EIH.shape)}, down "
                f"{tuple(self.down_EHI.shape)}, {self.top_k} a token"
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_EH.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.router_EH.shape[1]

    @property
    def intermediate(self) -> int:
        """I."""
        return self.down_EHI.shape[2]


class MoeWorkspace:
    """Buffers for steps of up to `max_tokens` tokens through experts of one size. One call at a time uses it.

    `counts_E`, `arrived` and `aligned` are 0 between calls: the kernels leave them so.
    """

    def __init__(self, like: Experts, *, max_tokens: int, invariant: bool = False) -> None:
        self.max_tokens = max_tokens
        self.invariant = invariant  # one configuration for any number of tokens: results do not depend on it
        device, dtype = like.gate_up_EIH.device, like.gate_up_EIH.dtype
        pairs, num = max_tokens * like.top_k, like.num_experts
        self.shape = (like.top_k, num, like.hidden, like.intermediate)

        def ints(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.ids_P, self.counts_E, self.num_blocks = ints(pairs), ints(num), ints(1)
        self.arrived, self.aligned = ints(max_tokens), ints(1)  # programs of a block of the router, of the alignment
        self.pairs = ints(pairs + num * LARGEST_BLOCK)  # sorted by expert, each expert's padded with -1 to whole blocks
        self.expert_of = ints(pairs // 16 + num + 1)  # of each block
        self.weights_P = torch.empty(pairs, dtype=torch.float32, device=device)
        # The router's partial sums: two of each logit, or as many as fill the card's processors.
        rows = max(_PROCESSORS * 64, (max_tokens + 63) * (4 if invariant else 2))
        self.partial = torch.empty(rows * num, dtype=torch.float32, device=device)
        self.inner_PI = torch.empty(pairs, like.intermediate, dtype=dtype, device=device)
        self.out_PH = torch.empty(pairs, like.hidden, dtype=dtype, device=device)

    def fits(self, experts: Experts, num_tokens: int) -> bool:
        """Whether a call with so many tokens may use it."""
        shape = (experts.top_k, experts.num_experts, experts.hidden, experts.intermediate)
        return num_tokens <= self.max_tokens and shape == self.shape

    def clear(self) -> None:
        """After a call that failed half way: the next one begins from nothing."""
        for tensor in (self.counts_E, self.arrived, self.aligned):
            tensor.zero_()

    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))


def router_tiling(num_tokens: int, num_experts: int, *, invariant: bool = False) -> tuple[int, int]:
    """Tokens of a router's block, and in how many parts its sums over H are split: the whole card shall take part."""
    if invariant:
        return 16, 4
    block = 16 if num_tokens <= 512 or num_experts > 256 else 64
    split = 2  # at least: sums that are read back lie row by row in the warps, and choosing needs no exchange
    while 2 * split * -(-num_tokens // block) <= _PROCESSORS and split < 8:
        split *= 2
    return block, split
