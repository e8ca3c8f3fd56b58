"""Joined pieces equal the whole decode, and no character of a stop string gets out, however the tokens come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from diptych.cluster.api.testing import byte_level_tokenizer
from diptych.cluster.api.text import StopMatcher, TextStream, TokenTable
from diptych.cluster.config import default_cache_dir
from diptych.cluster.models import resolve

WORDS = ["\u2581hello", "\u2581", "wor", "ld", "\u2581\u2581x", "\u00e9", "\u4f60\u597d", "a\u2581b", "<0xZZ>", " "]


def sentencepiece_like(decoder: decoders.Decoder) -> Tokenizer:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = [(word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<plain>", special=False)])
    return tokenizer


def llama_like() -> Tokenizer:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece_like(decoders.Sequence(steps))


def gemma_like() -> Tokenizer:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece_like(decoders.Sequence(steps))


def metaspace_like() -> Tokenizer:
    return sentencepiece_like(decoders.Metaspace())


def metaspace_never() -> Tokenizer:
    return sentencepiece_like(decoders.Metaspace(prepend_scheme="never"))


MAKERS: list[Callable[[], Tokenizer]] = [
    byte_level_tokenizer,
    llama_like,
    gemma_like,
    metaspace_like,
    metaspace_never,
]


@cache
def table(maker: Callable[[], Tokenizer]) -> TokenTable:
    return TokenTable(maker())


def splits(tokens: Sequence[int], cuts: Sequence[int]) -> Iterator[Sequence[int]]:
    edges = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    for begin, end in pairwise(edges):
        yield tokens[begin:end]


def streamed(table: TokenTable, parts: Iterator[Sequence[int]], stops: Sequence[str] = ()) -> list[str]:
    stream = TextStream(table, stops)
    pieces = []
    for part in parts:
        pieces.append(stream.feed(part))
        if stream.stopped:
            return pieces
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("maker", MAKERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joined_pieces_equal_the_decode_of_the_whole(maker: Callable[[], Tokenizer], data: st.DataObject) -> None:
    shared = table(maker)
    ids = st.integers(0, shared.tokenizer.get_vocab_size() + 3)
    tokens = data.draw(st.lists(ids, max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    assert "".join(streamed(shared, splits(tokens, cuts))) == shared.tokenizer.decode(tokens)


def is_settled(table: TokenTable, token: int) -> bool:
    """Whether no character goes on after it: one that begins in the prompt belongs to neither prompt nor answer."""
    text = table.spelling(token) if table.word(token) is not None else b""
    return text.isascii() and len(text) > 0 and (table.is_byte_level or not isinstance(table.piece(token), int))


@pytest.mark.parametrize("maker", MAKERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_answer_is_what_its_tokens_add_to_the_decode_of_the_prompt(
    maker: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    shared = table(maker)
    words = [shared.tokenizer.token_to_id(word) for word in (*WORDS, "a", "\u0120a", "<s>")]
    ids = st.sampled_from([word for word in words if word is not None])
    ids = ids | st.integers(0, shared.tokenizer.get_vocab_size() + 3)
    prompt = data.draw(st.lists(ids, max_size=6))
    while prompt and not is_settled(shared, prompt[-1]):
        prompt.pop()
    tokens = data.draw(st.lists(ids, max_size=20))
    before, whole = shared.tokenizer.decode(prompt), shared.tokenizer.decode([*prompt, *tokens])
    assert whole.startswith(before)
    cuts = data.draw(st.lists(st.integers(0, 20), max_size=6))
    stream = TextStream(shared, (), prompt=prompt)
    pieces = [stream.feed(part) for part in splits(tokens, cuts)]
    assert "".join([*pieces, stream.flush()]) == whole[len(before) :]


@pytest.mark.parametrize("maker", [llama_like, metaspace_like])
def test_the_space_before_a_first_word_is_kept_after_a_prompt_and_only_there(maker: Callable[[], Tokenizer]) -> None:
    shared = table(maker)
    hello, begin = shared.tokenizer.token_to_id("\u2581hello"), shared.tokenizer.token_to_id("<s>")
    for prompt, text in (([begin, hello], " hello"), ([begin], "hello"), ([], "hello")):
        stream = TextStream(shared, (), prompt=prompt)
        assert stream.feed([hello]) + stream.flush() == text


@pytest.mark.parametrize("maker", MAKERS)
@given(text=st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_token_by_token_equals_the_decode_for_real_text(maker: Callable[[], Tokenizer], text: str) -> None:
    shared = table(maker)
    tokens = shared.tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(streamed(shared, ([token] for token in tokens))) == shared.tokenizer.decode(tokens)


def test_no_piece_holds_half_a_character() -> None:
    shared = table(byte_level_tokenizer)
    text = "caf\u00e9 \u4f60\u597d \U0001f600!"
    pieces = streamed(shared, ([token] for token in shared.tokenizer.encode(text).ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_decoder_of_another_kind_goes_through_a_window() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "hel": 1, "##lo": 2, "you": 3, "!": 4}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    shared = TokenTable(tokenizer)
    assert shared.scheme is None
    assert streamed(shared, ([token] for token in [1, 2, 3, 4])) == ["hel", "lo", " you", " !", ""]
    for prompt in ([1], [3] * 30):
        stream = TextStream(shared, (), prompt=prompt)
        assert [stream.feed([token]) for token in [2, 3, 4]] == ["lo", " you", " !"]


def test_an_unusual_pattern_is_not_taken_for_sentencepiece() -> None:
    steps = [decoders.Replace(Regex("x+"), "y"), decoders.ByteFallback(), decoders.Fuse()]
    assert TokenTable(sentencepiece_like(decoders.Sequence(steps))).scheme is None


def first_end(text: str, stops: Sequence[str]) -> str | None:
    """The definition: write character by character, stop when the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@settings(max_examples=500)
@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_a_text_ends_where_the_first_stop_string_is_complete(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = []
    for part in parts:
        out.append(matcher.feed(part))
    if matcher.found is None:
        out.append(matcher.flush())
    wanted = first_end("".join(parts), stops)
    assert (matcher.found is not None) == (wanted is not None)
    assert "".join(out) == ("".join(parts) if wanted is None else wanted)


def test_text_is_held_only_while_it_may_begin_a_stop_string() -> None:
    matcher = StopMatcher(["\n\nHuman"])
    assert [matcher.feed(part) for part in ("a\n", "\nHu", "x\n")] == ["a", "", "\n\nHux"]
    assert matcher.flush() == "\n"


def test_a_stop_string_may_lie_across_tokens_and_characters() -> None:
    shared = table(byte_level_tokenizer)
    tokens = shared.tokenizer.encode("say \u4f60\u597d there").ids
    assert "".join(streamed(shared, ([token] for token in tokens), ["\u597d t"])) == "say \u4f60"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_default_models_own_tokenizer_streams_exactly(data: st.DataObject) -> None:
    shared = table(_own)
    tokens = data.draw(st.lists(st.integers(0, shared.tokenizer.get_vocab_size()), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    assert shared.is_byte_level
    assert "".join(streamed(shared, splits(tokens, cuts))) == shared.tokenizer.decode(tokens)


def _own() -> Tokenizer:
    return Tokenizer.from_file(str(resolve("smollm2-135m-instruct", default_cache_dir()).path / "tokenizer.json"))


@given(st.text("ab \u4f60\u00e9\U0001f600", max_size=10))
def test_spellings_joined_are_the_text(text: str) -> None:
    known = table(byte_level_tokenizer)
    assert b"".join(map(known.spelling, known.tokenizer.encode(text).ids)).decode() == text


@pytest.mark.parametrize("maker", MAKERS[1:])
def test_a_token_is_spelled_as_it_stands_within_a_text(maker: Callable[[], Tokenizer]) -> None:
    known = table(maker)
    ids = known.tokenizer.get_vocab()
    has_bytes = maker in (llama_like, gemma_like)
    assert known.spelling(ids["\u2581hello"]) == b" hello"
    assert known.spelling(ids["<0xE4>"]) == (b"\xe4" if has_bytes else b"<0xE4>")
    assert known.spelling(ids["</s>"]) == b"</s>"  # special: shown by its name, though no text shows it
    assert known.spelling(ids["<plain>"]) == b"<plain>"
    assert known.spelling(len(ids) + 7) == b""


def test_a_window_decoders_token_is_spelled_by_its_own_decode() -> None:
    tokenizer = sentencepiece_like(decoders.WordPiece())
    known = TokenTable(tokenizer)
    assert known.spelling(tokenizer.get_vocab()["wor"]) == b"wor"


@given(st.text("ab", max_size=12), st.integers(0, 6), st.lists(st.integers(1, 12), max_size=4), st.booleans())
def test_stop_strings_are_looked_for_after_the_first_tokens_only(
    text: str, min_tokens: int, cuts: list[int], include: bool
) -> None:
    known = table(byte_level_tokenizer)
    tokens = [known.tokenizer.encode(letter).ids[0] for letter in text]
    stream = TextStream(known, ["ba"], include_stop=include, min_tokens=min_tokens)
    out = ""
    for part in splits(tokens, cuts):
        out += stream.feed(part)
        if stream.stopped:
            break
    else:
        out += stream.flush()
    at = text.find("ba", min_tokens)
    assert out == (text if at < 0 else text[: at + 2 * include])
    assert stream.stopped == (at >= 0)
    assert stream.num_shown == len(out)
