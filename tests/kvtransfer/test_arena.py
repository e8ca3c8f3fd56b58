from __future__ import annotations

import pytest
import torch

from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout, compat_digest


def layout(block_tokens: int = 4, dtype: str = "float32", **other: int) -> KvLayout:
    sizes = {"layers": 3, "kv_heads": 2, "head_dim": 4} | other
    return KvLayout(dtype=dtype, block_tokens=block_tokens, **sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_crosses_between_arenas_of_other_block_sizes(dtype: str) -> None:
    source, target = KvArena(layout(4, dtype), 6), KvArena(layout(7, dtype), 6)
    source.storage.copy_(torch.randn(source.storage.shape))
    size = 10 * source.layout.bytes_per_token
    wire, again = bytearray(size), bytearray(size)
    source.pack([5, 0, 2], 2, 12, memoryview(wire))
    target.unpack([3, 1], 2, 12, memoryview(wire))
    target.pack([3, 1], 2, 12, memoryview(again))
    assert wire == again
    assert any(wire)


def test_layers_are_views_of_the_same_memory() -> None:
    arena = KvArena(layout(), 5)
    key, value = arena.layers[1]
    assert key.shape == (5, 2, 4, 4)
    value[3, 1, 2] = 9.0
    assert arena.storage[1, 1, 3, 1, 2].tolist() == [9.0] * 4
    assert arena.size_bytes == arena.storage.numel() * 4


def test_a_buffer_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes for 2 tokens"):
        KvArena(layout(), 2).pack([0], 0, 2, memoryview(bytearray(5)))


def test_block_size_is_local_and_all_else_must_agree() -> None:
    assert layout(4).mismatch(layout(16)) is None
    assert layout().mismatch(layout(layers=5)) == "layers 3 here and 5 there"
    words = layout().mismatch(layout(dtype="bfloat16", head_dim=8))
    assert words is not None
    assert "dtype" in words
    assert "head_dim" in words


def test_the_digest_covers_weights_geometry_and_attention() -> None:
    digests = {
        compat_digest(layout(), weights_digest=b"w", attention=b"rope"),
        compat_digest(layout(), weights_digest=b"v", attention=b"rope"),
        compat_digest(layout(), weights_digest=b"w", attention=b"ropy"),
        compat_digest(layout(dtype="bfloat16"), weights_digest=b"w", attention=b"rope"),
        compat_digest(layout(), weights_digest=b"wr", attention=b"ope"),
    }
    assert len(digests) == 5
    assert compat_digest(layout(16), weights_digest=b"w", attention=b"rope") in digests


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        layout(dtype="int4")
    with pytest.raises(ValueError, match="layers must be at least 1"):
        layout(layers=0)


def test_a_rehearsal_changes_nothing() -> None:
    arena = KvArena(layout(4), 2)
    arena.storage.copy_(torch.arange(arena.storage.numel()).view(arena.storage.shape))
    before = arena.storage.clone()
    arena.rehearse()
    assert torch.equal(arena.storage, before)


@pytest.mark.gpu
def test_kv_crosses_between_a_card_and_the_host_and_the_spare_block_is_nobodys() -> None:
    source, target = KvArena(layout(4, "bfloat16"), 6, "cuda:0", spare_blocks=1), KvArena(layout(7, "bfloat16"), 6)
    back = KvArena(layout(16, "bfloat16"), 3, "cuda:0", spare_blocks=1)
    source.storage.copy_(torch.randn(source.storage.shape))
    size = 10 * source.layout.bytes_per_token
    wire, again, last = bytearray(size), bytearray(size), bytearray(size)
    source.pack([5, 0, 2], 2, 12, memoryview(wire))
    target.unpack([3, 1], 2, 12, memoryview(wire))
    target.pack([3, 1], 2, 12, memoryview(again))
    back.unpack([2], 2, 12, memoryview(again))
    back.clear_tail([2], 12)
    back.pack([2], 2, 12, memoryview(last))
    assert wire == again == last
    assert any(wire)
    assert bool((back.storage[:, :, 2, :, 12:] == 0).all())
    assert back.layers[0][0].shape == (4, 2, 16, 4)
    assert bool((back.storage[:, :, 3] == 0).all())
