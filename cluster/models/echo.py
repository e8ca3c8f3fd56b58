"""The built-in model `echo`: no weights, a tokenizer made here, sizes from its settings. Called by source.py.

t17 t4 hello  ->  17 4, then the bytes of " hello"; any text comes back exactly, but for a space before a first word tN
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from diptych.protos import echo
from diptych.protos.echo import ECHO
from diptych.protos.errors import StartupError
from diptych.protos.settings import EchoSettings

from .facts import ModelFacts, ModelFolder

ARCHITECTURE = "EchoKv"
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPECIAL = {echo.END, echo.SYSTEM, echo.USER, echo.ASSISTANT}  # not shown in an answer; BAD and STOP are


def echo_folder(cache_dir: Path, settings: EchoSettings) -> ModelFolder:
    """The tokenizer's files below `cache_dir`, written if need be, and the facts. Raises StartupError."""
    texts = _texts()
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:16]
    folder = cache_dir.expanduser().absolute() / "models" / f"{ECHO}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _put(folder / name, text)
    except OSError as exc:
        raise StartupError(
            f"the files of the model {ECHO} cannot be written to {folder}: {exc.strerror or exc}. "
            "`cache_dir` in diptych.yaml names another place."
        ) from exc
    return ModelFolder(folder, _facts(settings))


def _facts(settings: EchoSettings) -> ModelFacts:
    return ModelFacts(
        name=ECHO,
        architecture=ARCHITECTURE,
        layers=settings.layers,
        kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        vocab_size=echo.VOCAB_SIZE,
        max_context_tokens=echo.MAX_CONTEXT_TOKENS,
        weights_bytes=0,
        num_parameters=0,
        eos_token_ids=(echo.END,),
        bos_token_id=None,
        dtype="float32",
        chat_template=_TEMPLATE,
    )


def _put(path: Path, text: str) -> None:
    """Whole or not at all, whoever writes at the same time: everybody writes the same."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@cache
def _texts() -> dict[str, str]:
    config = {"eos_token": echo.NAMES[echo.END], "chat_template": _TEMPLATE}
    return {"tokenizer.json": json.dumps(_tokenizer()), "tokenizer_config.json": json.dumps(config)}


def _tokenizer() -> dict[str, Any]:
    """Of the tokenizers library: a word between spaces that is a token is that token, anything else is bytes.

    Byte-level BPE without merges, where `ignore_merges` lets whole words be looked up first.
    """
    vocab = {f"\u0120t{number}": number for number in range(echo.NUM_WORDS)}  # U+0120 stands for a space
    vocab |= {char: echo.FIRST_BYTE + byte for byte, char in enumerate(_chars_of_bytes())}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": name, **marks, "special": number in _SPECIAL}
            for number, name in echo.NAMES.items()
        ],
        "normalizer": {"type": "Replace", "pattern": {"Regex": r"^t(?=\d)"}, "content": " t"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r" ?[^\s]+|\s"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": []},
    }


def _chars_of_bytes() -> list[str]:
    """GPT-2's table: 188 bytes stand for themselves, the others got characters from U+0100 on."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]
