"""What a device knows of the sequences in the runner's slots, in one int32 buffer, so that one kernel can change any of
it: an update is (word, value). Floats and seeds are views of the same words.

slot       | 0 | 1 | ... | max_slots - 1 | max_slots: the dummy, whom padding rows belong to
tokens_SC  ids by position: given by the host or sampled here; -1: sampled, but not soundly
blocks_SB  block ids in order of position; what no sequence has written is the spare block
rules_W    records of rules.py, wherever there was room; record_S has where a slot's begins
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rules import rule_words

_ALIGNED = 4  # words: sections begin where a vector load may

# What sampling a slot needs, by value of `kind_S`, in rising order of work; the bits are added to it.
GREEDY, DRAW, FILTERED = 0, 1, 2
WITH_RULES, WITH_LOGPROBS = 4, 8


class DeviceState:
    """S = max_slots + 1 slots, C tokens of context and one more, B blocks of context. Written through `words` alone.

    `spare_block` belongs to no sequence: the dummy slot's KV goes there. Rules have a place here where the vocabulary's
    size is given. ValueError: more words than an int32 counts.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        max_context_tokens: int,
        block_tokens: int,
        spare_block: int,
        device: torch.device,
        vocab_size: int = 0,
    ) -> None:
        slots = max_slots + 1
        self.max_slots = max_slots
        self.block_tokens = block_tokens
        self.vocab_size = vocab_size
        self.max_context_tokens = max_context_tokens
        self.tokens_stride = _aligned(max_context_tokens + 1)  # the last position's sampled token has a place, too
        self.blocks_stride = _aligned(-(-max_context_tokens // block_tokens))
        sizes = {
            "seed": 2 * slots,
            "top_p": 2 * slots,
            "min_p": 2 * slots,
            "temperature": slots,
            "top_k": slots,
            "kind": slots,
            "record": slots,
            "rules": rule_words(max_slots=max_slots, vocab=vocab_size),
            "blocks": slots * self.blocks_stride,
            "tokens": slots * self.tokens_stride,
        }
        self.offsets: dict[str, int] = {}  # of each section, in words
        total = 0
        for name, size in sizes.items():
            self.offsets[name] = total
            total += _aligned(size)
        if total >= 2**31:
            raise ValueError(f"{slots} slots of {max_context_tokens} tokens take {total} words, more than 2**31")
        self.words = torch.zeros(total, dtype=torch.int32, device=device)

        def section(name: str) -> Tensor:
            return self.words[self.offsets[name] : self.offsets[name] + sizes[name]]

        self.seed_S = section("seed").view(torch.int64)
        self.temperature_S = section("temperature").view(torch.float32)
        self.top_p_S = section("top_p").view(torch.float64)
        self.min_p_S = section("min_p").view(torch.float64)
        self.top_k_S = section("top_k")
        self.kind_S = section("kind")  # see above
        self.record_S = section("record")
        self.rules_W = section("rules")
        self.blocks_SB = section("blocks").view(slots, self.blocks_stride)
        self.tokens_SC = section("tokens").view(slots, self.tokens_stride)
        self.move_spare(spare_block)
        self.top_p_S.fill_(1.0)

    def move_spare(self, block: int) -> None:
        """The spare block is another one from now on. Before any sequence: all tables are of it alone then."""
        self.blocks_SB.fill_(block)

    @property
    def dummy(self) -> int:
        """The slot of padding rows: token 0 at position 0, greedy, in the spare block."""
        return self.max_slots


def _aligned(words: int) -> int:
    return -(-words // _ALIGNED) * _ALIGNED
