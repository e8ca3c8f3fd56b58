"""What the cluster's greedy tokens must equal: transformers' own `generate` on the same folder, in float32, eager.

Tie rule: token lists are equal, or at the first difference the reference's two best logits lie within 1e-4.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

TIE = 1e-4
WORDS = tuple(
    """river stone market yellow engine garden winter paper signal bridge doctor silver kitchen mountain letter ocean
    village window music copper teacher forest machine harbor bread planet carpet island simple story number""".split()
)
SENTENCES = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "1, 2, 3, 4, 5,",
    "Water boils at",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass
class Reference:
    """The reference model; `ties` tells the differences that the tie rule excused."""

    folder: Path
    model: Any = field(init=False)
    ties: list[str] = field(default_factory=list)
    _known: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM

        load: Any = AutoModelForCausalLM.from_pretrained
        self.model = load(str(self.folder), dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """`num_tokens` greedy tokens; end tokens do not stop it. What is known of a prompt is not computed again."""
        known = self._known.get(tuple(prompt), [])
        if len(known) < num_tokens:
            ids = torch.tensor([[*prompt, *known]])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens - len(known),
                min_new_tokens=num_tokens - len(known),
                eos_token_id=None,
                pad_token_id=0,
            )
            known = [int(t) for t in out[0, len(prompt) :]]
            self._known[tuple(prompt)] = known
        return known[:num_tokens]

    def check(self, prompt: Sequence[int], got: Sequence[int]) -> None:
        """Raise unless `got` is what the reference generates after the prompt, up to a tie."""
        expected = self.generate(prompt, len(got))
        differing = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
        if not differing:
            return
        first = differing[0]
        best = self._best_two([*prompt, *expected[:first]])
        gap = float(best.values[0] - best.values[1])
        where = (
            f"prompt of {len(prompt)} tokens, output token {first}: {expected[first]} and {got[first]}, gap {gap:.2e}"
        )
        assert gap <= TIE, f"wrong token: {where}"
        assert got[first] in best.indices.tolist(), f"wrong token at a tie: {where}"
        self.ties.append(where)

    def gap(self, tokens: Sequence[int]) -> float:
        """Between the two best logits of the token after `tokens`."""
        best = self._best_two(tokens)
        return float(best.values[0] - best.values[1])

    @torch.inference_mode()
    def _best_two(self, tokens: Sequence[int]) -> Any:
        return torch.topk(self.model(torch.tensor([list(tokens)])).logits[0, -1], 2)


@dataclass
class TextReference(Reference):
    """The reference with its tokenizer, for models that have one."""

    tokenizer: Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def prompts(self, count: int, longest: int) -> list[list[int]]:
        """Token ids of `count` prompts from 1 to about `longest` tokens; a third of them share a prefix."""
        rng = random.Random(17)
        head = " ".join(rng.choice(WORDS) for _ in range(70))
        texts = list(SENTENCES[:count])
        while len(texts) < count:
            size = rng.choice([1, 2, 7, 20, 60, longest])
            body = " ".join(rng.choice(WORDS) for _ in range(size))
            texts.append(f"{head} {body}" if len(texts) % 3 == 0 else body)
        encoded = [self.tokenizer.encode(text, add_special_tokens=False).ids[:longest] for text in texts]
        # lengths on both sides of a block's edge
        for i, length in enumerate((1, 15, 16, 17, 32, 33)):
            if len(encoded) > 12 + i:
                encoded[12 + i] = (encoded[12 + i] * longest)[:length]
        return encoded
