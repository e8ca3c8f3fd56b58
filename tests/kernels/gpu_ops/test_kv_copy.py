"""KV between blocks on a card and the wire form, and the checksum of the latter."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.kv_pack import cuda, kv_pack, kv_unpack, reference

L, H, B = 3, 2, 7
CASES = [
    # block_tokens, blocks, tok_from, tok_to
    (4, [5, 0, 3], 0, 12),
    (4, [5, 0, 3], 3, 9),
    (4, [5, 0, 3], 5, 6),
    (1, [6, 2, 4, 1], 1, 4),
    (16, [2, 6], 15, 17),
    (5, [1, 4], 2, 10),
]


def arena(block_tokens: int, dim: int, dtype: torch.dtype, place: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(L, 2, B, H, block_tokens, dim, generator=generator).to(dtype).to(place)


@pytest.mark.parametrize(("block_tokens", "blocks", "tok_from", "tok_to"), CASES)
@pytest.mark.parametrize(("dim", "dtype"), [(4, torch.bfloat16), (12, torch.float16), (2, torch.float32)])
def test_the_kernel_moves_the_very_bytes_of_the_definition_and_sums_them(
    block_tokens: int, blocks: list[int], tok_from: int, tok_to: int, dim: int, dtype: torch.dtype, place: torch.device
) -> None:
    source = arena(block_tokens, dim, dtype, place)
    wanted = torch.empty(L, 2, H, tok_to - tok_from, dim, dtype=dtype, device=place)
    reference.pack(source, blocks, tok_from, wanted)
    table = torch.tensor(blocks, dtype=torch.int32, device=place)
    total = torch.zeros(1, dtype=torch.int64, device=place)
    words = torch.full((wanted.numel() * wanted.element_size() // 8,), -1, dtype=torch.int64, device=place)
    planes, half = 2 * L, words.numel() // (2 * L)
    copy = cuda.copier(source, tok_from, wanted.shape[3], total, scatter=False)
    for first, count in ((0, 2), (2, planes - 2)):  # in pieces, as it is staged
        copy(words[first * half : (first + count) * half], table, first, count)
    assert torch.equal(words, wanted.view(-1).view(torch.int64))
    assert int(total) == reference.checksum(wanted)
    target, expected = torch.zeros_like(source), torch.zeros_like(source)
    total.zero_()
    cuda.copier(target, tok_from, wanted.shape[3], total, scatter=True)(words, table, 0, planes)
    reference.unpack(expected, blocks, tok_from, wanted)
    assert torch.equal(target, expected)
    assert int(total) == reference.checksum(wanted)


def test_the_checksum_knows_what_changed_moved_or_is_missing() -> None:
    wire = torch.randn(2, 2, 1, 5, 8, generator=torch.Generator().manual_seed(4))
    known = reference.checksum(wire)
    assert reference.checksum(wire.clone()) == known
    for change in ("bit", "swap", "zero"):
        other = wire.clone()
        words = other.view(-1).view(torch.int64)
        if change == "bit":
            words[17] ^= 1 << 40
        elif change == "swap":
            words[[3, 4]] = words[[4, 3]]
        else:
            words[9] = 0
        assert reference.checksum(other) != known, change
    assert reference.checksum(torch.zeros(8)) != reference.checksum(torch.zeros(16))
    with pytest.raises(ValueError, match="whole words"):
        reference.checksum(torch.zeros(3))


def test_on_a_cpu_the_same_sum_is_added() -> None:
    source = arena(4, 8, torch.float32, torch.device("cpu"))
    wire, total = torch.empty(L, 2, H, 6, 8), torch.full((1,), 5)
    kv_pack(source, [1, 3], 1, wire, total)
    assert int(total) == 5 + reference.checksum(wire)
    total.zero_()
    kv_unpack(torch.zeros_like(source), [1, 3], 1, wire, total)
    assert int(total) == reference.checksum(wire)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 1000])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_on_a_card_both_ways_and_through_pageable_memory(tokens: int, where: str) -> None:
    """1,000 tokens are several pieces: one buffer is filled while the other is read."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(8, 2, 90, 8, 16, 128, generator=generator).bfloat16().cuda()
    blocks = torch.randperm(90, generator=generator).tolist()[: -(-(tokens + 5) // 16)]
    wire = torch.full((8, 2, 8, tokens, 128), float("nan"), dtype=torch.bfloat16, device=where)
    wanted = torch.empty_like(wire, device="cpu")
    reference.pack(source.cpu(), blocks, 5, wanted)
    total = torch.zeros(1, dtype=torch.int64, device="cuda")
    target, expected = torch.zeros_like(source), torch.zeros(source.shape, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    kv_pack(source, blocks, 5, wire, total)
    torch.cuda.synchronize()
    assert torch.equal(wire.cpu(), wanted)
    assert int(total) == reference.checksum(wanted)
    kv_unpack(target, blocks, 5, wire)
    torch.cuda.synchronize()
    reference.unpack(expected, blocks, 5, wanted)
    assert torch.equal(target.cpu(), expected)
