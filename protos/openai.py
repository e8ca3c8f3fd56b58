"""OpenAI's request bodies for /v1/chat/completions and /v1/completions, as pure functions from bytes.

A field is honoured or refused with an error that names it: the classes list what is honoured, FIXED lists known fields
of which only the default is accepted, everything else is unknown. Nothing is coerced: "5" is not 5 and true is not 1.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from .errors import InvalidRequest
from .strict_json import parse_object, printable

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_LABELS = 16

# Known fields that change nothing at their default; any other value is refused.
FIXED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
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


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Wire):
    """`include_usage`: one more chunk with the token counts before the end."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against traffic analysis: not offered


class Message(_Wire):
    """One turn; `content` is the joined text of its parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


def _stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} strings; the limit is {MAX_STOPS}", "stop")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters", "stop")
    return tuple(dict.fromkeys(stops))


def _labels(value: object) -> None:
    """Checked and dropped: labels change nothing in an answer and nothing is stored that could carry them."""
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        raise InvalidRequest("metadata must be an object of strings", "metadata")
    if len(value) > MAX_LABELS or any(len(k) > 64 or len(v) > 512 for k, v in value.items()):
        raise InvalidRequest(f"metadata: at most {MAX_LABELS} entries of 64 and 512 characters", "metadata")


Stops = Annotated[tuple[str, ...], PlainValidator(_stops)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Label = Annotated[str, Field(max_length=512)]


class GenerationRequest(_Wire):
    """What both endpoints share. None means: not given."""

    fixed: ClassVar[frozenset[str]]

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
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
    return _validated(Message, fields, f"{path}.")


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

    fixed = frozenset(FIXED) - {"best_of", "echo", "suffix"}

    messages: Annotated[tuple[Message, ...], PlainValidator(_messages)]
    max_completion_tokens: Count | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """Under either of its two names; None when not given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, list) and value and all(isinstance(entry, str | list) for entry in value):
        if len(value) > 1:
            raise InvalidRequest(f"prompt holds {len(value)} prompts; send one request for each", "prompt")
        value = value[0]
    if isinstance(value, str):
        if not value:
            raise InvalidRequest("prompt is empty", "prompt")
        return value
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise InvalidRequest("prompt must be a string or a list of token ids", "prompt")
    if not value:
        raise InvalidRequest("prompt is empty", "prompt")
    return tuple(value)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    fixed = frozenset(
        {"best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "n", "presence_penalty", "suffix"}
    )

    prompt: Annotated[str | tuple[int, ...], PlainValidator(_prompt)]

    @property
    def wanted_tokens(self) -> int:
        """With the default."""
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's documented default


ModelT = TypeVar("ModelT", bound=BaseModel)
RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_chat(body: bytes) -> ChatRequest:
    """The chat request in `body`. Raises InvalidRequest naming the field."""
    request = _parse(ChatRequest, body)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """The completion request in `body`. Raises InvalidRequest naming the field."""
    return _parse(CompletionRequest, body)


def _parse(cls: type[RequestT], body: bytes) -> RequestT:
    fields = _without_fixed(parse_object(body), FIXED, cls.fixed, "")
    request = _validated(cls, fields, "")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is for requests with stream: true", "stream_options")
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


def _validated(cls: type[ModelT], fields: dict[str, Any], path: str) -> ModelT:
    for known_as in fields:  # before pydantic, which would collect every one of a million unknown fields
        if known_as not in cls.model_fields:
            name = path + printable(known_as)
            raise InvalidRequest(f"unknown field {name}", name)
    try:
        return cls.model_validate(fields)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False, include_context=True)[0]
    name = path + ".".join(printable(str(part)) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        raise InvalidRequest(f"unknown field {name}", name)
    if error["type"] == "missing":
        raise InvalidRequest(f"{name} is missing", name)
    raise InvalidRequest(f"{name}: {error['msg'].removeprefix('Input ')}", name)
