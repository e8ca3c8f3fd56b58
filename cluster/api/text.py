"""Token ids to text, piece by piece: UTF-8-safe detokenising and stop strings.

An answer's joined pieces are what its tokens add to the tokenizer's decode of the prompt, for any tokens and any split,
where the decoder is byte-level or of the sentencepiece kind. Other decoders go through the tokenizer with a window.

    tokens -> Detokenizer -> text that cannot change any more -> StopMatcher -> text that belongs to no stop string
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MIN_WINDOW, MAX_WINDOW = 4, 24  # tokens of a prompt that a decoder without a scheme looks back at


class Detokenizer(Protocol):
    """State of one answer."""

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens settle; what may still change is held back."""

    def flush(self) -> str:
        """The rest, at the end of the answer."""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: 188 bytes stand for themselves, the others got characters from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    table = {chr(byte): byte for byte in kept}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


class TokenTable:
    """What one tokenizer's tokens stand for, computed once per token; shared by all answers of a model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        spec = json.loads(tokenizer.to_str())
        self._special = {entry["id"] for entry in spec["added_tokens"] if entry["special"]}
        self._byte_of_char = _byte_of_char()
        self._pieces: dict[int, bytes | str | int | None] = {}
        self._spellings: dict[int, bytes] = {}
        self.scheme = _scheme(spec["decoder"])

    def showing(self, tokens: Iterable[int]) -> TokenTable:
        """The same, but for special tokens that are part of the text as they are written."""
        shown = frozenset(tokens) & self._special
        if not shown:
            return self
        table = copy(self)
        table._special = self._special - shown
        table._pieces, table._spellings = {}, {}
        return table

    @property
    def is_byte_level(self) -> bool:
        """Whether each token stands for bytes, joined and read as UTF-8."""
        return isinstance(self.scheme, _ByteLevel)

    def new(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for one answer to `prompt`: only the very first token of a text can lose its space."""
        match self.scheme:
            case _ByteLevel():
                return _ByteLevelText(self)
            case _SentencePiece() as scheme:
                return _SentencePieceText(self, scheme, prompt)
            case _:
                return _WindowText(self.tokenizer, prompt)

    def word(self, token: int) -> str | None:
        """The token's own string; None for special tokens and ids outside the vocabulary: decode skips both."""
        if token in self._special:
            return None
        word: str | None = self.tokenizer.id_to_token(token)
        return word

    def data(self, token: int) -> bytes:
        """A byte-level token's bytes."""
        found = self._pieces.get(token)
        if found is None:
            word = self.word(token) or ""
            try:
                found = bytes(self._byte_of_char[c] for c in word)
            except KeyError:  # an added token, written in plain characters
                found = word.encode()
            self._pieces[token] = found
        assert isinstance(found, bytes)
        return found

    def piece(self, token: int) -> str | int | None:
        """A sentencepiece token: its string, the value of a byte token, None when decode skips it."""
        if token not in self._pieces:
            word = self.word(token)
            self._pieces[token] = word if word is None else _byte_value(word)
        found = self._pieces[token]
        assert not isinstance(found, bytes)
        return found

    def spelling(self, token: int) -> bytes:
        """What one token stands for by itself, special ones by their names; empty for ids without a token."""
        found = self._spellings.get(token)
        if found is None:
            found = self._spellings[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        word: str | None = self.tokenizer.id_to_token(token)
        if word is None or token in self._special:
            return (word or "").encode()
        match self.scheme:
            case _ByteLevel():
                return self.data(token)
            case _SentencePiece() as scheme:
                value = self.piece(token)
                if isinstance(value, int) and scheme.byte_fallback:
                    return bytes([value])
                for old, new in scheme.replaces:
                    word = word.replace(old, new)
                return word.encode()
            case _:
                return str(self.tokenizer.decode([token])).encode()


def _byte_value(word: str) -> str | int:
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        try:
            return int(word[3:5], 16)
        except ValueError:
            return word
    return word


class _ByteLevel:
    """The decoder joins bytes and reads them as UTF-8."""


@dataclass(frozen=True, slots=True)
class _SentencePiece:
    """Replace, then bytes, then strip: the decoder of Llama 2, Mistral, Gemma."""

    replaces: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: str = ""  # this character is taken away from the front ...
    strip_count: int = 0  # ... at most so many times
    first_drops: str = ""  # Metaspace: these characters vanish from the first token


def _scheme(decoder: dict[str, object] | None) -> _ByteLevel | _SentencePiece | None:
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    assert isinstance(steps, list)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevel()
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        drops = "" if steps[0].get("prepend_scheme", "always") == "never" else mark
        return _SentencePiece(replaces=((mark, " "),), first_drops=drops)
    replaces = []
    while kinds and kinds[0] == "Replace" and "String" in steps[0]["pattern"]:
        replaces.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        kinds, steps = kinds[1:], steps[1:]
    if kinds == ["ByteFallback", "Fuse"]:
        return _SentencePiece(tuple(replaces), byte_fallback=True)
    if kinds == ["ByteFallback", "Fuse", "Strip"] and steps[2]["stop"] == 0:
        return _SentencePiece(tuple(replaces), True, steps[2]["content"], steps[2]["start"])
    return None


class _ByteLevelText:
    """Rust's and Python's replacement of broken UTF-8 agree: one U+FFFD per maximal broken part."""

    def __init__(self, table: TokenTable) -> None:
        self._data = table.data
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, tokens: Sequence[int]) -> str:
        data = self._data
        return self._decode(b"".join([data(token) for token in tokens]))

    def flush(self) -> str:
        return self._decode(b"", True)


class _SentencePieceText:
    """A run of byte tokens is one string or, broken anywhere, one U+FFFD per byte: it is held until it ends."""

    def __init__(self, table: TokenTable, scheme: _SentencePiece, prompt: Sequence[int]) -> None:
        self._piece = table.piece
        self._scheme = scheme
        self._run = bytearray()
        self._first = bool(scheme.first_drops)
        self._to_strip = scheme.strip_count
        for token in prompt:  # as far as the front of the text is not behind us: a few tokens
            if not self._first and not self._to_strip:
                break
            self.feed([token])
        self.flush()

    def feed(self, tokens: Sequence[int]) -> str:
        out = []
        for token in tokens:
            piece = self._piece(token)
            if piece is None:
                continue
            if isinstance(piece, int):
                if self._scheme.byte_fallback:
                    self._run.append(piece)
                    continue
                piece = f"<0x{piece:02X}>"
            out.append(self._end_run())
            out.append(self._settle(piece))
        return self._stripped("".join(out))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _settle(self, piece: str) -> str:
        if self._first:
            self._first = False
            piece = piece.replace(self._scheme.first_drops, "")
        for old, new in self._scheme.replaces:
            piece = piece.replace(old, new)
        return piece

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._scheme.strip):
                self._to_strip = 0
            else:
                text = text[len(self._scheme.strip) :]
                self._to_strip -= 1
        return text


class _WindowText:
    """Any other decoder: decode a window that starts at a settled place, emit what the new tokens added to it.

    The first window begins with the end of the prompt: as few of its tokens as make some text, but no broken character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        for size in range(min(MIN_WINDOW, len(prompt)), min(MAX_WINDOW, len(prompt)) + 1):
            self._window = list(prompt[len(prompt) - size :])
            text = tokenizer.decode(self._window)
            if text.strip() and REPLACEMENT not in text:
                break
        self._settled = len(self._window)  # tokens of the window whose text is out

    def feed(self, tokens: Sequence[int]) -> str:
        self._window.extend(tokens)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._settled])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        del self._window[: self._settled]
        self._settled = len(self._window)
        return str(after[len(before) :])


class StopMatcher:
    """Ends a text at the stop string that is complete first, and never lets out a character of one.

    hold back:  ...text that is out | suffix that may begin a stop string

    With `include` the stop string itself is let out, and ends the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Text that is safe to show. After a stop string was `found` there is none."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            end, begin = min(hits)
            self.found = text[begin:end]
            self._held = ""
            return text[: end if self._include else begin]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, the whole of it excluded."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class TextStream:
    """Tokens in, text to show out, as it goes on from `prompt`. `stopped`: a stop string ended the text; feed no more.

    Stop strings are not looked for in the text of the first `min_tokens` tokens.
    """

    def __init__(
        self,
        table: TokenTable,
        stops: Sequence[str],
        *,
        prompt: Sequence[int] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = table.new(prompt)
        self._matcher = StopMatcher(stops, include=include_stop)
        self.watches = bool(stops)  # for strings that end the text
        self._unwatched = min_tokens if stops else 0
        self.num_settled = 0  # characters that the tokens so far have become
        self.num_shown = 0  # those of them that belong to no stop string

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._matcher.found is not None

    @property
    def found_stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.found

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add, as far as it is settled."""
        unwatched = ""
        if self._unwatched:
            unwatched = self._detokenizer.feed(tokens[: self._unwatched])
            tokens, self._unwatched = tokens[self._unwatched :], max(0, self._unwatched - len(tokens))
        text = self._detokenizer.feed(tokens)
        self.num_settled += len(unwatched) + len(text)
        return self._show(unwatched + self._matcher.feed(text))

    def flush(self) -> str:
        """The rest at the end; may still find a stop string in it."""
        text = self._detokenizer.flush()
        self.num_settled += len(text)
        tail = self._matcher.feed(text)
        return self._show(tail + self._matcher.flush())

    def _show(self, text: str) -> str:
        self.num_shown += len(text)
        return text
