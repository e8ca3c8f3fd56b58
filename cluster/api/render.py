"""Messages to token ids: the model's chat template in a sandbox, then its tokenizer. One Renderer per served model.

The sandbox and its bounds are template.py's; how a conversation is put so that a template can say it: turns.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from diptych.protos.errors import ContextTooLong, InvalidRequest, StartupError
from diptych.protos.messages import Message, Text, said
from diptych.protos.openai_template import FLAGS, TemplateOptions
from diptych.protos.openai_tools import ToolUse
from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import compact

from .fair_thread import FairThread
from .template import REFUSALS, Budget, TooMuch, compile_template, render, template_data
from .template_facts import facts_of
from .text import TokenTable
from .turns import (
    attempts,
    is_system_told,
    tools_in_words,
    turns_of,
    with_instruction,
    with_marks,
    without_system,
)

AS_USUAL = TemplateOptions()
_ANYWHERE = FLAGS | {"reasoning_effort"}  # means nothing to a model that does not reason, and is taken there too
_ASKED = "a question of no weight"
INLINE_CHARS = 8 << 10  # longer texts are tokenised in a thread: 8 KiB take about 2 ms


class Renderer:
    """Templates and tokenises for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        *,
        variables: dict[str, str] | None = None,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.table = TokenTable(tokenizer)
        self._variables = variables or {}
        self._source = template or ""
        self._template = None if template is None else compile_template(template)
        self._facts = None
        if template is not None and self._template is not None:
            self._facts = facts_of(self._template, template, self._variables)
        self._clock = clock
        # A byte-level token stands for at most as many characters as its string has; others may swallow any number.
        is_plain = self.table.is_byte_level and tokenizer.normalizer is None
        self._longest = max(map(len, tokenizer.get_vocab())) if is_plain else None
        self._thread = FairThread("tokenise")

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
        self._thread.close()

    @property
    def has_template(self) -> bool:
        """Whether conversations can be written for this model at all."""
        return self._template is not None

    @property
    def knows_tools(self) -> bool:
        """Whether the template itself tells the model of tools. Where it does not, a system instruction does, and the
        model is asked to write calls in the generic form, `{"name": ..., "arguments": {...}}`.
        """
        return self._facts is not None and self._facts.knows_tools

    def reads(self, variable: str) -> bool:
        """Whether the template looks at a variable of this name."""
        return self._facts is not None and variable in self._facts.reads

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        tools: ToolUse | None = None,
        options: TemplateOptions = AS_USUAL,
        instruction: str | None = None,
    ) -> str:
        """The conversation as the model's template writes it, ready for the assistant's turn or what `options` say.

        `tools` reach the prompt unless no call is allowed; `instruction` joins the first system message or is one. A
        template that refuses the conversation gets it in other turns, as turns.py tells. Raises InvalidRequest when
        there is no template, when it refuses the messages in every form, takes too long or writes too much.
        """
        if self._template is None or self._facts is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        variables = self._told(options)
        if tools is not None and tools.mode == "none":
            tools = None
        mark = _mark(messages[-1].content) if options.continue_final else ""
        if mark:
            last = messages[-1]
            messages = [*messages[:-1], replace(last, parts=(*last.parts, Text(mark)))]
        words = [instruction] if instruction else []
        if tools is not None and not self._facts.knows_tools:
            words.insert(0, tools_in_words(tools))
        turns = functools.reduce(with_instruction, words, turns_of(messages, self._facts))
        offered = tools.tools if tools is not None and self._facts.knows_tools else ()
        budget = Budget(_size(messages, tools, options) + sum(map(len, words)), self._clock)
        refusal: Exception | None = None
        silent: str | None = None  # what a template wrote that leaves a system message out
        for form, entries in attempts(turns, offered, self._facts):
            data = template_data(form, variables, tools=entries, generation_prompt=options.generation_prompt)
            try:
                text = render(self._template, data, budget)
            except TooMuch:
                raise InvalidRequest("the chat template makes too much of these messages", "messages") from None
            except REFUSALS as exc:
                refusal = refusal or exc
                continue
            if self._tells_systems(data, text, budget):
                silent = text
                break
            silent = silent or text
        if silent is not None:
            return _cut(silent, mark, messages[-1]) if mark else silent
        why = printable(str(refusal), 300)
        raise InvalidRequest(f"the model's chat template refuses these messages: {why}", "messages") from refusal

    def _tells_systems(self, data: Mapping[str, Any], text: str, budget: Budget) -> bool:
        """Whether the rendering `text` of `data` has what its system turns say. Where another turn says the same, the
        template is asked again, with words in their places that nobody can have said.
        """
        assert self._template is not None
        form = data["messages"]
        told = is_system_told(form, text, str({**data, "messages": without_system(form)}) + self._source)
        if told is not None:
            return told
        marked, words = with_marks(form, secrets.token_hex(8))
        try:
            written = render(self._template, {**data, "messages": marked}, budget)
        except (TooMuch, *REFUSALS):
            return False
        return all(word in written for word in words)

    def answer_lead(self, text: str, messages: Sequence[Message], options: TemplateOptions = AS_USUAL) -> str:
        """The end of the rendered prompt `text` that is the answer's own beginning: the text that the answer goes on
        with, or what the template writes behind a user's turn. Empty where the prompt ends in another way.
        """
        if self._template is None or self._facts is None:
            return ""
        if options.continue_final:
            return messages[-1].content
        turns = turns_of([said("user", _ASKED)], self._facts)
        form, _ = next(attempts(turns, (), self._facts))
        data = template_data(form, self._told(options), generation_prompt=options.generation_prompt)
        try:
            small = render(self._template, data, Budget(0, self._clock))
        except (TooMuch, *REFUSALS):
            return ""
        _, found, lead = small.rpartition(_ASKED)
        return lead if found and text.endswith(lead) else ""

    def _told(self, options: TemplateOptions) -> Mapping[str, object]:
        assert self._facts is not None
        given, reads = options.variables, self._facts.reads
        for name in given:
            if name not in reads and name not in _ANYWHERE:
                raise InvalidRequest(
                    f"chat_template_kwargs.{name}: this model's chat template reads no such variable",
                    f"chat_template_kwargs.{name}",
                )
        switches: dict[str, object] = {}
        if given.get("reasoning_effort") == "none":  # the switch that templates have for it
            switches = {name: False for name in FLAGS if name in reads}
        return {**self._variables, **options.implied, **switches, **given}

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
        encodings = await self._thread.run(functools.partial(batch, self.tokenizer))
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
            encodings = await self._thread.run(functools.partial(batch, self.tokenizer))
        return tuple(dict.fromkeys(tuple(encoding.ids) for encoding in encodings if encoding.ids))


def ends_inside(text: str, start_marker: str, end_marker: str) -> bool:
    """Whether `text` ends between the two markers. To be asked of an `answer_lead`: a whole prompt also holds what
    users write about markers.
    """
    return text.rfind(start_marker) > text.rfind(end_marker)


def _size(messages: Sequence[Message], tools: ToolUse | None, options: TemplateOptions) -> int:
    size = sum(len(str(value)) for value in options.variables.values())
    for message in messages:
        size += len(message.content) + len(message.reasoning_content or "") + len(message.name or "")
        size += sum(len(call.id) + len(call.name) + len(call.text) for call in message.tool_calls)
    return size + (0 if tools is None else sum(len(compact(tool.told())) for tool in tools.tools))


def _mark(text: str) -> str:
    """A word that no text can hold which it is made of; its space shows whether the template keeps a text's spaces."""
    return f"continue-{hashlib.sha256(text.encode()).hexdigest()} "


def _cut(text: str, mark: str, last: Message) -> str:
    """The rendering up to the mark; without the spaces before it where the template takes spaces from a text's end."""
    place = text.rfind(mark.strip())
    kept = text[: max(place, 0)]
    if text[place : place + len(mark)] != mark:
        kept = kept.rstrip()
    if place < 0 or not kept.rstrip().endswith(last.content.removesuffix(mark).strip()):
        told = "the model's chat template does not write the last message as it is, so that no answer can go on with it"
        raise InvalidRequest(f"continue_final_message: {told}", "continue_final_message")
    return kept


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
