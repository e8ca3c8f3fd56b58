"""The memory behind the blocks of one engine. The runner computes in it; the transfer thread packs from it and into it.

One tensor [layers, 2, num_blocks, kv_heads, block_tokens, head_dim]: a block is one strided copy, whatever the layers.
On a card what the transfer thread does here is over when the call returns: no stream of another thread waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.kernels.ops.kv_pack import kv_pack, kv_unpack

from .layout import KvLayout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def copy_alone() -> None:
    """To be called by a thread that only copies: torch then keeps no second team of workers, which would slow down the
    one that computes. Threads that have computed already are not affected.
    """
    torch.set_num_threads(1)


class KvArena:
    """KV memory of `num_blocks` blocks, and of `spare_blocks` more behind them that no pool knows of: a runner's rows
    that belong to no sequence write there.

    `layers[i]` is layer i's (K, V), each [num_blocks + spare_blocks, kv_heads, block_tokens, head_dim].
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: str = "cpu", *, spare_blocks: int = 0) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        blocks = num_blocks + spare_blocks
        shape = (layout.layers, 2, blocks, layout.kv_heads, layout.block_tokens, layout.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 * NaN is NaN.
        self.storage = torch.zeros(shape, dtype=_DTYPES[layout.dtype], device=device)
        self.layers: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in self.storage]
        self._settle()

    @property
    def size_bytes(self) -> int:
        """Bytes of the arena."""
        return self.storage.nbytes

    def bytes(self) -> NDArray[np.uint8]:
        """The arena's own memory, [layers, 2, num_blocks, kv_heads, block_tokens, bytes of head_dim]. On a CPU only."""
        array: NDArray[np.uint8] = self.storage.view(torch.uint8).numpy()
        return array

    def pack(self, blocks: Sequence[int], tok_from: int, tok_to: int, out: memoryview) -> None:
        """Write positions tok_from .. tok_to - 1 of the sequence in `blocks` to `out` in wire form.

        `out` is writable and has exactly (tok_to - tok_from) * bytes_per_token bytes.
        """
        if tok_to > tok_from:
            kv_pack(self.storage, blocks, tok_from, self._wire(out, tok_to - tok_from))

    def unpack(self, blocks: Sequence[int], tok_from: int, tok_to: int, data: memoryview) -> None:
        """Read what `pack` wrote into positions tok_from .. tok_to - 1 of the sequence in `blocks`. `data` is writable
        memory, for torch's sake, and is not changed.
        """
        if tok_to > tok_from:
            kv_unpack(self.storage, blocks, tok_from, self._wire(data, tok_to - tok_from))

    def rehearse(self) -> None:
        """Pack a position and unpack it again, so that the first transfer finds the kernels for that compiled: a thread
        that compiles keeps no lease alive. Before any sequence has a block.
        """
        position = memoryview(bytearray(self.layout.bytes_per_token))
        with ThreadPoolExecutor(1, thread_name_prefix="rehearse") as thread:  # whose buffers end with it
            thread.submit(self.pack, [0], 0, 1, position).result()
            thread.submit(self.unpack, [0], 0, 1, position).result()

    def clear_tail(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Zero what follows position num_tokens - 1 in its block. Attention gives these places weight 0, which does not
        cancel the NaN that an earlier sequence may have left there.
        """
        index, offset = divmod(num_tokens, self.layout.block_tokens)
        if offset:
            self.storage[:, :, blocks[index], :, offset:] = 0
            self._settle()

    def _settle(self) -> None:
        if self.storage.is_cuda:
            torch.cuda.current_stream(self.storage.device).synchronize()

    def _wire(self, buffer: memoryview, num_tokens: int) -> Tensor:
        layout = self.layout
        if buffer.nbytes != num_tokens * layout.bytes_per_token:
            raise ValueError(f"{buffer.nbytes} bytes for {num_tokens} tokens of {layout.bytes_per_token} bytes")
        flat = torch.frombuffer(buffer, dtype=_DTYPES[layout.dtype])
        return flat.view(layout.layers, 2, layout.kv_heads, num_tokens, layout.head_dim)
