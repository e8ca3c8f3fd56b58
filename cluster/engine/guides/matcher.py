"""What a guide needs of a grammar library: one matcher follows one text, token by token. Knows no requests.

`Llguidance` makes matchers of the library of that name, which is bounded by fuel in all it does and lets other threads
run while it compiles; xgrammar.py has the other backend.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from diptych.protos.constraint import mask_words
from diptych.protos.errors import InvalidRequest, StartupError

Words = NDArray[np.int32]

# What one token may cost the step loop: the library's own bounds. With a quarter of them 3 of 267 real schemas could
# not be followed to the end of an answer, with all of them every one can, at 3 ms for the slowest of 49,152 tokens.
_STEP_FUEL = 200_000  # of the lexer
_STEP_ITEMS = 50_000  # of the parser
_THREADS = max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class Matcher(Protocol):
    """Follows one text. Once `error` says something it stays so, and nothing may follow."""

    @property
    def error(self) -> str:
        """Why the text cannot go on, in the library's words; empty while it can."""

    def consume(self, token: int) -> bool:
        """Whether `token` may come; then it has."""

    def fill(self, mask_W: Words) -> None:
        """The tokens that may come next, ends of the answer included, into int32 [mask_words(vocab)]."""

    def forced(self) -> list[int]:
        """The tokens that must follow, as the tokenizer would write them; all of them the model has rows for."""

    def is_over(self) -> bool:
        """Whether nothing but the end may follow."""

    def consume_text(self, text: str) -> bool:
        """Whether `text` may come; then it has."""


def fill_rows(rows: Sequence[tuple[Matcher, int]], masks_MW: Words) -> None:
    """Masks of several matchers, each into its row; those of llguidance in threads that share no lock."""
    together = [(one, at) for one, at in rows if isinstance(one, _LlguidanceMatcher) and one.fits]
    apart = {at for _, at in together}
    for matcher, at in rows:
        if at not in apart:
            matcher.fill(masks_MW[at])
    if together:
        _LlguidanceMatcher.fill_together(together, masks_MW)


def narrow(wide_W: Words, mask_W: Words, vocab_size: int) -> None:
    """Into `mask_W` what `wide_W`, of more tokens, says of the first `vocab_size`; no others are allowed."""
    mask_W[:] = wide_W[: len(mask_W)]
    if beyond := -vocab_size % 32:
        mask_W.view(np.uint32)[-1] &= np.uint32(0xFFFFFFFF >> beyond)


class Compiled(Protocol):
    """A compiled grammar."""

    def start(self) -> Matcher:
        """A matcher at the beginning of a text; microseconds."""


class Backend(Protocol):
    """A grammar library over one model's tokens."""

    def compile(self, grammar: str) -> Compiled:
        """Raises InvalidRequest in the library's words. Takes milliseconds, and lets other threads run meanwhile."""

    def close(self) -> None:
        """End what it has started."""


def limits() -> llguidance.LLParserLimits:
    """What keeps every call short, whatever the grammar."""
    return llguidance.LLParserLimits(
        step_lexer_fuel=_STEP_FUEL, step_max_items=_STEP_ITEMS, max_lexer_states=50_000, verbose_errors=False
    )


class Llguidance:
    """Tokens of a tokenizer.json. `vocab_size`: rows of the model's logits, which may be more or fewer than tokens."""

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        try:
            self._tokenizer = self._load(tokenizer_file, end_tokens)
        except BaseException as exc:  # the library raises ValueError, and what its Rust side panics with
            raise StartupError(f"{tokenizer_file} cannot be used for constrained answers: {exc}") from exc

    def _load(self, file: Path, end_tokens: tuple[int, ...]) -> llguidance.LLTokenizer:
        plain = llguidance.LLTokenizer(str(file))
        size = max(self._vocab_size, plain.vocab_size)
        return llguidance.LLTokenizer(_unnamed(file, plain), n_vocab=size, eos_token=list(end_tokens) or None)

    def compile(self, grammar: str) -> Compiled:
        """See Backend. `grammar`: Lark in the library's dialect, or its own JSON form."""
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise InvalidRequest(f"the form of the answer cannot be enforced: {_first_line(matcher.get_error())}")
        # Copies begin with what this has found: 10 us for their first mask instead of 1 ms.
        _fill([(matcher, 0)], np.zeros((1, mask_words(self._tokenizer.vocab_size)), np.int32))
        return _LlguidanceGrammar(matcher, self._tokenizer, self._vocab_size)

    def close(self) -> None:
        """Nothing."""


class _LlguidanceGrammar:
    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: llguidance.LLTokenizer, vocab_size: int) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def start(self) -> Matcher:
        return _LlguidanceMatcher(self._matcher.deep_copy(), self._tokenizer, self._vocab_size)


class _LlguidanceMatcher:
    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: llguidance.LLTokenizer, vocab_size: int) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # A tokenizer may know more tokens than the model has logits.
        is_wide = tokenizer.vocab_size > vocab_size
        self._wide = np.zeros(mask_words(tokenizer.vocab_size), np.int32) if is_wide else None

    @property
    def fits(self) -> bool:
        """Whether its masks have the length of the model's."""
        return self._wide is None

    @staticmethod
    def fill_together(rows: Sequence[tuple[_LlguidanceMatcher, int]], masks_MW: Words) -> None:
        """See fill_rows; all of them fit."""
        _fill([(one._matcher, at) for one, at in rows], masks_MW)

    @property
    def error(self) -> str:
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def consume(self, token: int) -> bool:
        return self._matcher.consume_token(token)

    def fill(self, mask_W: Words) -> None:
        target = mask_W if self._wide is None else self._wide
        _fill([(self._matcher, 0)], target[None])
        if self._wide is not None:
            narrow(self._wide, mask_W, self._vocab_size)

    def forced(self) -> list[int]:
        tokens = self._matcher.compute_ff_tokens()
        return list(takewhile(lambda token: token < self._vocab_size, tokens))

    def is_over(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def consume_text(self, text: str) -> bool:
        return self._matcher.consume_tokens(self._tokenizer.tokenize_str(text))


def _unnamed(file: Path, plain: llguidance.LLTokenizer) -> str:
    """The tokenizer.json with other names for its special tokens.

    A grammar that says `</think>` says eight characters; the library tokenises what must follow, would find the special
    token in it, and end the answer over its own choice.
    """
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"].get("vocab")
    for token in tokenizer.get("added_tokens", ()):
        number = token["id"]
        if not plain.is_special_token(number):
            continue
        name, token["content"], token["special"] = token["content"], f"<|\U0010fffd{number}|>", True
        if isinstance(vocabulary, dict) and vocabulary.get(name) == number:
            vocabulary[token["content"]] = vocabulary.pop(name)
        elif isinstance(vocabulary, list) and number < len(vocabulary):
            vocabulary[number][0] = token["content"]
    tokenizer["post_processor"] = None  # it names special tokens, and adds none here
    return json.dumps(tokenizer)


def _fill(rows: list[tuple[llguidance.LLMatcher, int]], masks_MW: Words) -> None:
    """Masks into their rows. The executor lets other threads run meanwhile, which a matcher by itself does not."""
    _executor().unsafe_compute_mask_ptr(rows, masks_MW.ctypes.data, masks_MW[0].nbytes, len(masks_MW))


@cache
def _executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor(num_threads=_THREADS)


def _first_line(error: str) -> str:
    return error.strip().split("\n", 1)[0][:300]
