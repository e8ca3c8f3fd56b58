"""Bodies of POST /v1/tokenize and /v1/detokenize in vLLM's shapes, as pure functions from bytes.

cluster/api/tokenize.py calls them. A text or a conversation is read here by the rules of completions and of chat;
what its tokens are, only a model's tokenizer knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest
from .messages import Message
from .openai_messages import read_messages
from .openai_template import TemplateOptions, read_template
from .openai_tools import ToolUse, read_tools
from .strict_json import parse_object, printable
from .wire_checks import JsonObject, a_flag, a_text, refuse

MAX_TEXT_CHARS = 1 << 20  # of a text to tokenise: some 200 ms of a thread that long prompts wait for too
MAX_TOKEN_IDS = 1 << 18  # of a list to turn into text
MAX_MODEL_CHARS = 256
TEMPLATE_FIELDS = frozenset({"chat_template_kwargs", "add_generation_prompt", "continue_final_message"})
TEXT_FIELDS = frozenset({"model", "prompt", "add_special_tokens", "return_token_strs"})
CHAT_FIELDS = frozenset({"model", "messages", "tools", "add_special_tokens", "return_token_strs", *TEMPLATE_FIELDS})
DETOKENIZE_FIELDS = frozenset({"model", "tokens"})
# Known fields that change nothing at their default; any other value is refused, for this reason.
FIXED: dict[str, tuple[tuple[object, ...], str]] = {
    "chat_template": ((None,), "is refused: a template is a program, and programs come with the model"),
    "mm_processor_kwargs": ((None, {}), "is for models that read images; this server's read text"),
}
AS_USUAL = TemplateOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """`prompt` or `messages` is there, and not both. `model` None: the one that is served."""

    model: str | None
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    tools: ToolUse | None = None
    template: TemplateOptions = AS_USUAL
    add_special_tokens: bool
    return_token_strs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeRequest:
    """`tokens` are whole numbers, of whatever vocabulary."""

    model: str | None
    tokens: tuple[int, ...]


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """The request in `body`. Raises InvalidRequest naming the field."""
    fields = _without_fixed(parse_object(body))
    is_chat = fields.get("messages") is not None
    if is_chat and fields.get("prompt") is not None:
        raise InvalidRequest("messages and prompt each are what to tokenise: send one of them", "prompt")
    _known(fields, CHAT_FIELDS | {"prompt"} if is_chat else TEXT_FIELDS | {"messages"}, is_chat=is_chat)
    with_special = a_flag(fields.get("add_special_tokens"), "add_special_tokens")
    model = _model(fields)
    with_words = a_flag(fields.get("return_token_strs"), "return_token_strs") is True
    if not is_chat:
        text = a_text(fields.get("prompt"), "prompt", least=0, most=MAX_TEXT_CHARS)
        return TokenizeRequest(
            model=model, prompt=text, add_special_tokens=with_special is not False, return_token_strs=with_words
        )
    template = read_template({name: fields.get(name) for name in TEMPLATE_FIELDS})
    messages = read_messages(fields["messages"])
    last = messages[-1]
    if template.continue_final and (last.role != "assistant" or not last.content.strip() or last.tool_calls):
        told = "is for conversations that end with an assistant's message with a text and no calls"
        raise refuse("continue_final_message", told)
    return TokenizeRequest(
        model=model,
        messages=messages,
        tools=read_tools({"tools": fields.get("tools")}),
        template=template,
        add_special_tokens=with_special is True,  # a chat template writes its own
        return_token_strs=with_words,
    )


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """The request in `body`. Raises InvalidRequest naming the field."""
    fields = parse_object(body)
    _known(fields, DETOKENIZE_FIELDS, is_chat=False)
    tokens = fields.get("tokens")
    if tokens is None:
        raise refuse("tokens", "is missing")
    if not isinstance(tokens, list):
        raise refuse("tokens", "must be a list of token ids")
    if len(tokens) > MAX_TOKEN_IDS:
        raise refuse("tokens", f"has {len(tokens)} ids; the limit is {MAX_TOKEN_IDS}")
    if not all(type(token) is int for token in tokens):
        raise refuse("tokens", "must be a list of token ids, which are whole numbers")
    return DetokenizeRequest(model=_model(fields), tokens=tuple(tokens))


def tokenized(tokens: tuple[int, ...], max_model_len: int, words: list[str] | None) -> JsonObject:
    """The answer to tokenize; `words`: the vocabulary's own names of the tokens."""
    return {"count": len(tokens), "max_model_len": max_model_len, "tokens": list(tokens), "token_strs": words}


def detokenized(text: str) -> JsonObject:
    """The answer to detokenize."""
    return {"prompt": text}


def _model(fields: JsonObject) -> str | None:
    return None if fields.get("model") is None else a_text(fields["model"], "model", most=MAX_MODEL_CHARS)


def _known(fields: JsonObject, names: frozenset[str], *, is_chat: bool) -> None:
    for name in fields:
        if name in names:
            continue
        if name in CHAT_FIELDS and not is_chat and "tokens" not in names:
            raise refuse(name, "is for a conversation: it goes with messages, not with prompt")
        shown = printable(name)
        raise InvalidRequest(f"unknown field {shown}; here may stand: {', '.join(sorted(names))}", shown)


def _without_fixed(fields: dict[str, Any]) -> dict[str, Any]:
    for name in FIXED.keys() & fields.keys():
        defaults, why = FIXED[name]
        if fields[name] not in defaults:
            raise refuse(name, why)
    return {name: value for name, value in fields.items() if name not in FIXED}
