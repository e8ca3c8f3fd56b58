"""The shape of KV on one engine, its canonical form on the wire, and what two engines must agree on. No torch.

wire form of a token range: [layer][k, v][kv_head][token][head_dim], contiguous, whatever the block sizes of the ends
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

PROTOCOL_VERSION = 2
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """KV geometry of one engine. `dtype` is a key of ITEM_BYTES; `block_tokens` may differ between peers."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        for name in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"KV layout: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.bytes_per_token * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def mismatch(self, other: KvLayout) -> str | None:
        """Why KV of `other` cannot be used here, or None. Block sizes may differ."""
        differing = [
            f"{name} {getattr(self, name)} here and {getattr(other, name)} there"
            for name in ("layers", "kv_heads", "head_dim", "dtype")
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(differing) or None

    def describe(self) -> str:
        """What `compat_digest` covers of the geometry, in words."""
        heads = f"{self.kv_heads} KV heads of {self.head_dim}"
        return f"protocol {PROTOCOL_VERSION}, {self.layers} layers, {heads}, {self.dtype}"


def compat_digest(layout: KvLayout, *, weights_digest: bytes, attention: bytes) -> bytes:
    """32 bytes that are equal exactly when one engine may use the other's KV.

    `weights_digest` names the weights; `attention` is the identity of everything else that shapes KV: rope parameters,
    sliding windows, quantisation. Block size and ring geometry are not covered: they are local.
    """
    digest = hashlib.sha256()
    for part in (layout.describe().encode(), weights_digest, attention):
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()
