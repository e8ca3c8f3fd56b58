"""OpenAI's request bodies for /v1/chat/completions and /v1/completions, as pure functions from bytes.

A field is honoured or refused with an error that names it: the classes list what is honoured, FIXED lists known fields
of which only the default is accepted, everything else is unknown. Nothing is coerced: "5" is not 5 and true is not 1.
The fields that choose tokens: openai_sampling.py.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, PlainValidator

from .errors import InvalidRequest
from .openai_sampling import Alternatives, SamplingFields, Wire, validated
from .strict_json import parse_object

MAX_MESSAGES = 4096
MAX_LABELS = 16

# Known fields that change nothing at their default; any other value is refused.
FIXED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}
MAX_ANSWERS = 128  # of one request, over all its prompts
_VLLM_FIXED = ("skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "use_beam_search")
# What clients echo back from an answer's message, empty.
_EMPTY_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "reasoning": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


class StreamOptions(Wire):
    """`include_usage`: one more chunk with the token counts before the end."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against traffic analysis: not offered


class Message(Wire):
    """One turn; `content` is the joined text of its parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


def _labels(value: object) -> None:
    """Checked and dropped: labels change nothing in an answer and nothing is stored that could carry them."""
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        raise InvalidRequest("metadata must be an object of strings", "metadata")
    if len(value) > MAX_LABELS or any(len(k) > 64 or len(v) > 512 for k, v in value.items()):
        raise InvalidRequest(f"metadata: at most {MAX_LABELS} entries of 64 and 512 characters", "metadata")


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Label = Annotated[str, Field(max_length=512)]


class GenerationRequest(SamplingFields):
    """What both endpoints share. None means: not given."""

    fixed: ClassVar[frozenset[str]]

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower is sooner; not given: 0
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    explain: bool | None = None  # how the request was answered, as the answer's field `diptych`
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: Annotated[None, PlainValidator(_labels)] = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage is True


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list with at least one message", "messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(value)} entries; the limit is {MAX_MESSAGES}", "messages")
    return tuple(_message(entry, f"messages[{i}]") for i, entry in enumerate(value))


def _message(value: object, path: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must be an object", path)
    fields = _without_fixed(value, _EMPTY_IN_MESSAGE, frozenset(_EMPTY_IN_MESSAGE), f"{path}.")
    if "content" in fields:
        fields["content"] = _content(fields["content"], f"{path}.content")
    return validated(Message, fields, f"{path}.")


def _content(value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{path} must be a string or a list of text parts", path)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequest(f"{path}[{i}] must be a part of type text; this model reads text only", f"{path}[{i}]")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidRequest(f"{path}[{i}] must have the fields type and text, a string", f"{path}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    fixed = frozenset(FIXED) - {"suffix"}

    messages: Annotated[tuple[Message, ...], PlainValidator(_messages)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    @property
    def wanted_tokens(self) -> tuple[str, int] | None:
        """The field and the number, under either of its two names; None when not given."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives told with each generated token; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, list) and value and all(isinstance(entry, str | list) for entry in value):
        if len(value) > MAX_ANSWERS:
            raise InvalidRequest(f"prompt holds {len(value)} prompts; {MAX_ANSWERS} is the limit", "prompt")
        return tuple(_prompt(entry, f"prompt[{at}]") for at, entry in enumerate(value))
    return (_prompt(value, "prompt"),)


def _prompt(value: object, path: str) -> str | tuple[int, ...]:
    if not isinstance(value, str) and not (isinstance(value, list) and all(type(token) is int for token in value)):
        raise InvalidRequest(f"{path} must be a string or a list of token ids", "prompt")
    if not value:
        raise InvalidRequest(f"{path} is empty", "prompt")
    return value if isinstance(value, str) else tuple(value)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions. One prompt or several, each a text or token ids; each gets its n choices."""

    fixed = frozenset({"suffix", *_VLLM_FIXED})

    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # 0: with echo, to score a prompt
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: int | None = None

    @property
    def wanted_tokens(self) -> tuple[str, int] | None:
        """The field and the number; None when not given."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_chat(body: bytes) -> ChatRequest:
    """The chat request in `body`. Raises InvalidRequest naming the field."""
    request = _parse(ChatRequest, body)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs is for requests with logprobs: true", "top_logprobs")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """The completion request in `body`. Raises InvalidRequest naming the field."""
    request = _parse(CompletionRequest, body)
    if request.best_of not in (None, request.num_choices):
        raise InvalidRequest(f"best_of must equal n ({request.num_choices}): every choice is returned", "best_of")
    if (total := len(request.prompt) * request.num_choices) > MAX_ANSWERS:
        number = len(request.prompt)
        raise InvalidRequest(
            f"{number} prompts with n: {request.num_choices} make {total} choices; {MAX_ANSWERS} is the limit", "n"
        )
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens: 0 is for requests with echo: true", "max_tokens")
    return request


def _parse(cls: type[RequestT], body: bytes) -> RequestT:
    fields = _without_fixed(parse_object(body), FIXED, cls.fixed, "")
    request = validated(cls, fields, "")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is for requests with stream: true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs is for whole answers; leave out stream", "prompt_logprobs")
    return request


def _without_fixed(
    fields: dict[str, Any], table: dict[str, tuple[object, ...]], known: frozenset[str], path: str
) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name not in known:
            kept[name] = value
        elif not any(_same(value, default) for default in table[name]):
            raise InvalidRequest(f"{path}{name} is not supported yet: leave it out", f"{path}{name}")
    return kept


def _same(value: object, default: object) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)
