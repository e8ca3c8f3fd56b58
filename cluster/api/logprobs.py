"""Logprobs in the shapes of OpenAI's two endpoints and of vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diptych.protos.types import TokenLogprobs

from .text import TokenTable

JsonObject = dict[str, Any]
LEAST = -9999.0  # JSON has no infinity; vLLM's number


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a text. `offset`: characters before it; `logprobs` None: the first token of a prompt has none."""

    token: int
    logprobs: TokenLogprobs | None
    offset: int


def chat_logprobs(entries: Sequence[Entry], table: TokenTable) -> JsonObject:
    """choices[].logprobs of a chat answer. A token that is part of a character has a replacement in `token`, and its
    own `bytes`.
    """
    content = []
    for entry in entries:
        assert entry.logprobs is not None
        top = [_spelled(token, logprob, table) for token, logprob in entry.logprobs.top]
        content.append({**_spelled(entry.token, entry.logprobs.logprob, table), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _spelled(token: int, logprob: float, table: TokenTable) -> JsonObject:
    spelling = table.spelling(token)
    text = spelling.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(spelling)}


def text_logprobs(entries: Sequence[Entry], table: TokenTable) -> JsonObject:
    """choices[].logprobs of a text completion. The token itself is among its top_logprobs, wherever it ranks."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            top.append(None)
            continue
        alternatives = {_word(token, table): max(logprob, LEAST) for token, logprob in entry.logprobs.top}
        top.append(alternatives | {_word(entry.token, table): max(entry.logprobs.logprob, LEAST)})
    return {
        "tokens": [_word(entry.token, table) for entry in entries],
        "token_logprobs": [None if e.logprobs is None else max(e.logprobs.logprob, LEAST) for e in entries],
        "top_logprobs": top,
        "text_offset": [entry.offset for entry in entries],
    }


def _word(token: int, table: TokenTable) -> str:
    """OpenAI writes a token that is no whole text as its bytes; so two of them do not become one key."""
    spelling = table.spelling(token)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def prompt_logprobs(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, table: TokenTable
) -> list[JsonObject | None]:
    """vLLM's prompt_logprobs: for each token of the prompt but the first, itself and the most likely ones by id."""
    told: list[JsonObject | None] = [None]
    for token, own in zip(prompt[1:], logprobs, strict=True):
        found = {str(token): _ranked(token, own.logprob, own.rank, table)}
        for rank, (other, logprob) in enumerate(own.top[:num_top], 1):
            found.setdefault(str(other), _ranked(other, logprob, rank, table))
        told.append(found)
    return told


def _ranked(token: int, logprob: float, rank: int, table: TokenTable) -> JsonObject:
    decoded = table.spelling(token).decode(errors="replace")
    return {"logprob": max(logprob, LEAST), "rank": rank, "decoded_token": decoded}
