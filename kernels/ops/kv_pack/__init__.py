"""KV of a token range between paged blocks and the contiguous wire form, both ways."""

from .launch import kv_pack, kv_unpack

__all__ = ["kv_pack", "kv_unpack"]
