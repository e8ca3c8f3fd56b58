"""By which two names are seen to serve the same model: a digest of what its answers depend on, whatever it is called.

entry.py asks for each served model; the gateway compares. It reads no weights: of their files it tells which they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from .facts import ModelFolder

_TEXTS = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def weights_id(folder: ModelFolder, *, computed: tuple[str, ...], has_weights: bool = True) -> str:
    """Equal for equal weights, tokenizer, template, defaults and ways to compute, such as the dtype, which are
    `computed`; empty where a file cannot be looked at. Weights are equal where their files are the same ones, on this
    machine: a copy counts as another model, for nobody reads a hundred gigabytes to find out. No name is part of it.
    """
    digest = hashlib.sha256()
    try:
        for told in _told(folder, has_weights):
            digest.update(hashlib.sha256(told).digest())
    except OSError:
        return ""
    digest.update(repr(computed).encode())
    return f"w_{digest.hexdigest()[:24]}"


def _told(folder: ModelFolder, has_weights: bool) -> Iterator[bytes]:
    yield repr(replace(folder.facts, name="")).encode()
    for name in _TEXTS:
        file = folder.path / name
        yield name.encode()
        yield file.read_bytes() if file.exists() else b""
    if not has_weights:  # they are made up from the shape
        yield b"random"
        return
    files = sorted(folder.path.glob("*.safetensors"))
    if folder.facts.weights_bytes and not files:
        raise FileNotFoundError(folder.path)
    for file in files:
        about = file.stat()
        yield repr((file.name, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)).encode()
