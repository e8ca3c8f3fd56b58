from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.kv_pack import cpu, kv_pack, kv_unpack, reference

L, H, D, B = 3, 2, 4, 7


def arena(block_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(L, 2, B, H, block_tokens, D, generator=torch.Generator().manual_seed(1)).to(dtype)


CASES = [
    # block_tokens, blocks, tok_from, tok_to
    (4, [5, 0, 3], 0, 12),
    (4, [5, 0, 3], 3, 9),
    (4, [5, 0, 3], 4, 8),
    (4, [5, 0, 3], 5, 6),
    (1, [6, 2, 4, 1], 1, 4),
    (16, [2], 0, 1),
    (16, [2, 6], 15, 17),
    (4, [1], 2, 2),
]


@pytest.mark.parametrize(("block_tokens", "blocks", "tok_from", "tok_to"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_equals_the_reference(
    block_tokens: int, blocks: list[int], tok_from: int, tok_to: int, dtype: torch.dtype
) -> None:
    source = arena(block_tokens, dtype)
    wires = [torch.full((L, 2, H, tok_to - tok_from, D), 7.0, dtype=dtype) for _ in range(2)]
    reference.pack(source, blocks, tok_from, wires[0])
    cpu.pack(source, blocks, tok_from, wires[1])
    assert torch.equal(*wires)
    targets = [torch.zeros_like(source) for _ in range(2)]
    reference.unpack(targets[0], blocks, tok_from, wires[0])
    cpu.unpack(targets[1], blocks, tok_from, wires[0])
    assert torch.equal(*targets)
    assert int((targets[0] != 0).sum()) == wires[0].numel()  # nothing beside the range was touched


def test_two_block_sizes_agree_on_the_wire() -> None:
    source = arena(5, torch.float32)
    wire = torch.empty(L, 2, H, 13, D)
    kv_pack(source, [4, 1, 0, 6], 3, wire)
    target = torch.zeros(L, 2, B, H, 3, D)
    kv_unpack(target, [6, 5, 4, 3, 2, 1], 3, wire)
    again = torch.empty_like(wire)
    kv_pack(target, [6, 5, 4, 3, 2, 1], 3, again)
    assert torch.equal(wire, again)


@pytest.mark.parametrize(
    ("blocks", "tok_from", "tokens", "words"),
    [([0, 1], 5, 4, "do not lie in 2 x 4"), ([0, 99], 0, 8, "arena of 7"), ([0, -1], 0, 8, "arena of 7")],
)
def test_a_range_outside_is_refused(blocks: list[int], tok_from: int, tokens: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kv_pack(arena(4, torch.float32), blocks, tok_from, torch.empty(L, 2, H, tokens, D))


def test_another_dtype_or_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        kv_pack(arena(4, torch.float32), [0], 0, torch.empty(L, 2, H, 2, D, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="arena wants"):
        kv_pack(arena(4, torch.float32), [0], 0, torch.empty(L, 2, H + 1, 2, D))
