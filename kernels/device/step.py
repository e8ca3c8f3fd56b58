"""A step as the layers of a model see it on a device: tensors alone, so that a graph can be captured over it.

rows    | a | b | c c c | d d |    first `decode_rows` rows of one token each (token i is row i's), then prompts
tokens  | 0 | 1 | 2 3 4 | 5 6 |    query_start = 0 1 2 5 7; a padding row is one token of the dummy slot
Made by the runner; read by decoders and ops, which know nothing else of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..ops.paged_attention.split import Splits

# What is wrong with a row, bits of `flags_R`. Kernels set bits with atomic or: rows never clear each other's.
KV_NOT_FINITE = 1  # keys or values of one of its tokens, in the last layer
LOGITS_NOT_FINITE = 2
RULED_OUT = 4  # its rules left no token; the logits before them are finite
TOKEN_MISSING = 8  # it goes on from a token that was never sampled soundly


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """T tokens in R rows; N logits are wanted. int32 on the device unless said; static memory, filled anew each step.

    Under a graph the host's numbers are those of its shape: what a step lacks is padding rows of the dummy slot, whose
    KV goes to the arena's spare block, so that nothing needs to know which rows are padding. A row of padding behind
    the prompts may have no token at all.
    """

    ids_T: Tensor
    positions_T: Tensor  # of each token in its sequence, from 0
    slot_mapping_T: Tensor  # int64: block * block_tokens + offset, where its keys and values go
    row_T: Tensor  # the row of each token
    query_start_R: Tensor  # R + 1 entries: the first token of each row, then T
    seq_len_R: Tensor  # positions of the row's sequence after this step; new tokens included
    slot_R: Tensor  # the row of `blocks_SB`
    blocks_SB: Tensor  # block ids by slot, in order of position; behind the sequence's own ones: leftovers
    kept_N: Tensor  # int64: tokens whose logits are wanted
    flags_R: Tensor  # 0 before the first layer; see above
    splits: Splits | None  # decode attention's work list; None where its implementation needs none
    num_tokens: int  # T
    decode_rows: int  # rows of one token each: row i is token i
    prompt_rows: int  # the rows behind them
    most_prompt: int  # tokens of the longest of those; 0 without any
    block_tokens: int

    @property
    def num_rows(self) -> int:
        """R, padding included."""
        return self.decode_rows + self.prompt_rows

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token: the kind of step that a graph serves."""
        return self.prompt_rows == 0
