"""The runner of `runner: echo`: no model, but real KV. Each position's (position, token id) is written into the arena,
and the next token is a hash of what the row's blocks hold, so a transfer that loses a byte changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diptych.kvtransfer.arena import KvArena
from diptych.protos.testing import Cell, EchoRunner


class ArenaEchoRunner(EchoRunner):
    """EchoRunner over layer 0 of an arena: K holds positions and V token ids, both in every element of head 0.

    The arena must be float32, which holds whole numbers below 2^24 exactly; narrower types do not.
    """

    def __init__(self, arena: KvArena, *, max_slots: int, max_step_tokens: int, vocab_size: int) -> None:
        assert arena.layout.dtype == "float32", "the echo runner needs float32 KV"
        super().__init__(
            num_blocks=0,
            block_tokens=arena.layout.block_tokens,
            max_slots=max_slots,
            max_step_tokens=max_step_tokens,
            vocab_size=vocab_size,
        )
        self._positions_BT, self._ids_BT = (tensor[:, 0, :, 0] for tensor in arena.layers[0])

    def read(self, blocks: Sequence[int], num_tokens: int) -> list[Cell]:
        """What lies at positions 0 .. num_tokens - 1 of a block table."""
        used = torch.tensor(blocks[: -(-num_tokens // self.block_tokens)])
        positions = self._positions_BT[used].flatten()[:num_tokens].long().tolist()
        ids = self._ids_BT[used].flatten()[:num_tokens].long().tolist()
        return list(zip(positions, ids, strict=True))

    def write(self, blocks: Sequence[int], start: int, cells: Sequence[Cell]) -> None:
        """Put cells at positions start, start + 1, ... of a block table."""
        at = torch.arange(start, start + len(cells))
        block, offset = torch.tensor(blocks)[at // self.block_tokens], at % self.block_tokens
        cells_T2 = torch.tensor(cells, dtype=torch.float32)
        self._positions_BT[block, offset] = cells_T2[:, 0]
        self._ids_BT[block, offset] = cells_T2[:, 1]
