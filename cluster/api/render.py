"""Messages to token ids: the model's chat template in a sandbox, then its tokenizer. One Renderer per served model.

The sandbox and its bounds are template.py's.
"""

from __future__ import annotations

import asyncio
import json
import operator
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer

from diptych.protos.errors import ContextTooLong, InvalidRequest, StartupError
from diptych.protos.openai import Message

from .template import TooMuch, compile_template, render
from .text import TokenTable

INLINE_CHARS = 8 << 10  # longer texts are tokenised in a thread: 8 KiB take about 2 ms


class Renderer:
    """Templates and tokenises for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        *,
        variables: dict[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.table = TokenTable(tokenizer)
        self._template = None if template is None else compile_template(template)
        self._variables = variables or {}
        self._clock = clock
        # A byte-level token stands for at most as many characters as its string has; others may swallow any number.
        is_plain = self.table.is_byte_level and tokenizer.normalizer is None
        self._longest = max(map(len, tokenizer.get_vocab())) if is_plain else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    @classmethod
    def load(cls, folder: Path, template: str | None) -> Renderer:
        """From a model folder's tokenizer.json. Raises StartupError."""
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as exc:  # the library raises bare Exception
            raise StartupError(f"{folder / 'tokenizer.json'} cannot be read: {exc}") from exc
        return cls(tokenizer, template, variables=_special_tokens(folder / "tokenizer_config.json"))

    def close(self) -> None:
        """End the tokenising thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's template writes it, ready for the assistant's turn.

        Raises InvalidRequest when there is no template or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in messages
        ]
        try:
            return render(self._template, turns, self._variables, self._clock)
        except TooMuch:
            raise InvalidRequest("the chat template makes too much of these messages", "messages") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as exc:
            raise InvalidRequest(f"the model's chat template refuses these messages: {exc}", "messages") from exc

    async def encode(self, text: str, *, add_special: bool, max_tokens: int, param: str) -> tuple[int, ...]:
        """Token ids; long texts in a thread. Raises ContextTooLong early when `text` cannot fit into `max_tokens`."""
        at_least = 0 if self._longest is None else -(-len(text) // self._longest)
        if at_least > max_tokens:
            raise ContextTooLong(
                f"the prompt has at least {at_least} tokens; this model's context holds {max_tokens}", param
            )
        if len(text) <= INLINE_CHARS:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special).ids
            return tuple(ids)
        batch = operator.methodcaller("encode_batch", [text], add_special_tokens=add_special)  # frees the interpreter
        encodings = await asyncio.get_running_loop().run_in_executor(self._pool, batch, self.tokenizer)
        return tuple(encodings[0].ids)

    async def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that write a word at the start of a text and after a space."""
        forms = []
        for word in words:
            bare = word.lstrip(" ")
            forms += [bare, f" {bare}"] if bare else [word]
        batch = operator.methodcaller("encode_batch", forms, add_special_tokens=False)
        if sum(map(len, forms)) <= INLINE_CHARS:
            encodings = batch(self.tokenizer)
        else:
            encodings = await asyncio.get_running_loop().run_in_executor(self._pool, batch, self.tokenizer)
        return tuple(dict.fromkeys(tuple(encoding.ids) for encoding in encodings if encoding.ids))


def _special_tokens(file: Path) -> dict[str, str]:
    """bos_token, eos_token and the like, as templates name them."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise StartupError(f"{file} cannot be read: {exc}") from exc
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
