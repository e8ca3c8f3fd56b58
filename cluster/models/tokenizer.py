"""The tokenizer inside a GGUF file -> tokenizer.json, tokenizer_config.json, chat_template.jinja. For source.py."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .gguf import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's numbers of token types
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

# llama.cpp's name of a pre-tokenizer -> the tokenizers library's description of the same splits
_PRE_TOKENIZERS: Mapping[str, dict[str, object]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}


def tokenizer_files(file: GgufFile, max_context_tokens: int) -> dict[str, str]:
    """The tokenizer's files by name. Raises StartupError for a kind of tokenizer that is not known exactly."""
    model = file.get("tokenizer.ggml.model", str)
    pre = file.try_get("tokenizer.ggml.pre", str) or "default"
    remedy = "Use the model's folder with tokenizer.json instead."
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        known = ", ".join(f"gpt2/{name}" for name in _PRE_TOKENIZERS)
        raise file.trouble(f"has a tokenizer of the kind {model}/{pre}; known are {known}", remedy)
    if file.try_get("tokenizer.ggml.add_eos_token", bool) or file.try_get("tokenizer.ggml.add_space_prefix", bool):
        raise file.trouble(
            "has a tokenizer that adds end tokens or spaces to a text, which is not read from GGUF", remedy
        )
    tokens = file.items("tokenizer.ggml.tokens", str)
    kinds = file.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise file.trouble(f"is damaged: {len(tokens)} tokens ({len(set(tokens))} different) of {len(kinds)} types")
    names = {key: _token(file, tokens, key) for key in ("bos", "eos", "unknown", "padding")}
    text = json.dumps(_tokenizer(file, tokens, kinds, names["bos"]), ensure_ascii=False)
    _check(file, text)
    config = {
        "add_prefix_space": False,
        "bos_token": names["bos"],
        "clean_up_tokenization_spaces": False,
        "eos_token": names["eos"],
        "model_max_length": max_context_tokens,
        "pad_token": names["padding"] or names["eos"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": names["unknown"],
    }
    files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    template = file.try_get("tokenizer.chat_template", str)
    if template is not None:
        files["chat_template.jinja"] = template
    return files


def _token(file: GgufFile, tokens: list[str], key: str) -> str | None:
    token_id = file.try_get(f"tokenizer.ggml.{key}_token_id", int)
    if token_id is None:
        return None
    if token_id >= len(tokens):
        raise file.trouble(f"is damaged: its {key} token {token_id} is not among its {len(tokens)} tokens")
    return tokens[token_id]


def _tokenizer(file: GgufFile, tokens: list[str], kinds: list[int], bos: str | None) -> dict[str, object]:
    merges = [merge.split(" ") for merge in file.items("tokenizer.ggml.merges", str)]
    if any(len(pair) != 2 for pair in merges):
        raise file.trouble("is damaged: a merge of its tokenizer does not join two tokens")
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    begins = bos if file.try_get("tokenizer.ggml.add_bos_token", bool) else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[file.get("tokenizer.ggml.pre", str)],
        "post_processor": None if begins is None else _begin_with(begins, ids[begins]),
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def _begin_with(bos: str, bos_id: int) -> dict[str, object]:
    first: dict[str, object] = {"SpecialToken": {"id": bos, "type_id": 0}}
    text_a: dict[str, object] = {"Sequence": {"id": "A", "type_id": 0}}
    text_b: dict[str, object] = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text_a],
        "pair": [first, text_a, text_b],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _check(file: GgufFile, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as exc:  # the library raises bare Exception for everything
        raise file.trouble(f"has a tokenizer that the tokenizers library refuses ({exc})") from exc
