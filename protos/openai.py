"""OpenAI's request bodies for /v1/chat/completions and /v1/completions, as pure functions from bytes.

A field is honoured or refused with an error that names it: the classes list what is honoured, FIXED lists known fields
of which only the default is accepted, everything else is unknown. Nothing is coerced: "5" is not 5 and true is not 1.
The fields that choose tokens: openai_sampling.py; of messages, tools, the answer's form, the template: openai_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, PlainValidator

from .errors import InvalidRequest
from .messages import Message
from .openai_messages import read_messages
from .openai_output import FORM_FIELDS, OutputForm, read_form
from .openai_sampling import Alternatives, SamplingFields, Wire, validated
from .openai_template import TEMPLATE_FIELDS, TemplateOptions, read_template
from .openai_tools import TOOL_FIELDS, ToolUse, read_tools
from .strict_json import parse_object, printable
from .wire_checks import an_object, is_default, may_fit, refuse

MAX_LABELS = 16
MAX_OPTIONS_BYTES = 64 << 10

# Known fields that change nothing at their default; any other value is refused.
FIXED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    "guided_decoding_backend": (None, "auto"),
    "guided_whitespace_pattern": (None,),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "prompt_cache_options": (None, {}, {"mode": "implicit"}),
    "prompt_cache_retention": (None, "in_memory"),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
MAX_ANSWERS = 128  # of one request, over all its prompts
_VLLM_FIXED = ("skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "use_beam_search")
# Refused for good, with the reason.
_REFUSED = {
    "chat_template": "is refused: a template is a program, and programs come with the model, not with a request",
    "documents": "is not supported: put the documents' text into a message",
    "guided_decoding_backend": "is refused: this server has one way to enforce a form; leave it out",
    "guided_whitespace_pattern": "is refused: whitespace in enforced JSON is the server's, and bounded; leave it out",
}


def no_obfuscation(value: object) -> None:
    """Of the field stream_options.include_obfuscation. Raises InvalidRequest."""
    if value is not None and value is not False:
        name = "stream_options.include_obfuscation"
        raise InvalidRequest(f"{name}: padding against traffic analysis is not offered: leave it out", name)


class StreamOptions(Wire):
    """`include_usage`: one more chunk with the token counts before the end."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[None, PlainValidator(no_obfuscation)] = None


def check_labels(value: object) -> None:
    """Of the field metadata. Dropped where nothing is stored that could carry them. Raises InvalidRequest."""
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        raise InvalidRequest("metadata must be an object of strings", "metadata")
    if len(value) > MAX_LABELS or any(len(k) > 64 or len(v) > 512 for k, v in value.items()):
        raise InvalidRequest(f"metadata: at most {MAX_LABELS} entries of 64 and 512 characters", "metadata")


# Where a request goes, and what opens it there: words of clients' libraries, and of gateways that providers run.
_CONNECTION = frozenset(
    "base_url api_base api_base_url baseurl endpoint endpoint_url azure_endpoint url host proxy proxies api_key apikey "
    "api_version api_type key token authorization access_token azure_ad_token organization headers extra_headers "
    "default_headers extra_query extra_body custom_llm_provider aws_access_key_id aws_secret_access_key "
    "aws_session_token aws_bedrock_runtime_endpoint vertex_credentials".split()
)


def _options(value: object) -> Mapping[str, Mapping[str, Any]]:
    """Of the field provider_options. Raises InvalidRequest."""
    if value is None:
        return {}
    options = an_object(value, "provider_options")
    if not may_fit(options, MAX_OPTIONS_BYTES):
        raise refuse("provider_options", f"has more than {MAX_OPTIONS_BYTES} bytes of JSON")
    found = {name: an_object(given, f"provider_options.{printable(name)}") for name, given in options.items()}
    for name, given in found.items():
        for field in given:
            if field.lower().replace("-", "_") in _CONNECTION:
                path = f"provider_options.{printable(name)}.{printable(field)}"
                raise refuse(path, "may not be set by a request: where it goes and with which key, this server says")
    return found


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Label = Annotated[str, Field(max_length=512)]


class GenerationRequest(SamplingFields):
    """What both endpoints share. None means: not given."""

    fixed: ClassVar[frozenset[str]]
    # Of several fields of the body, or by readers of other wire formats; none by its own name.
    made: ClassVar[frozenset[str]] = frozenset({"output_form", "cuts_to_fit"})

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower is sooner; not given: 0
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    first_token_timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    explain: bool | None = None  # how the request was answered, as the answer's field `diptych`
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None  # requests of one key go to where their prefixes are
    metadata: Annotated[None, PlainValidator(check_labels)] = None
    output_form: OutputForm | None = None
    cuts_to_fit: bool = False  # more tokens than fit may be asked for, and as many as fit are given

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage is True


def _messages(value: object) -> tuple[Message, ...]:
    """A tuple, which no JSON holds, is what the reader of another wire format has read already."""
    return value if isinstance(value, tuple) else read_messages(value)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    fixed = frozenset(FIXED) - {"suffix"}
    made = frozenset({"output_form", "cuts_to_fit", "tool_use", "template"})

    messages: Annotated[tuple[Message, ...], PlainValidator(_messages)]
    tool_use: ToolUse | None = None
    template: TemplateOptions = TemplateOptions()
    include_reasoning: bool | None = None  # false: the answer comes without its reasoning
    reasoning_budget: Count | None = None  # the most tokens of reasoning; then it is ended
    # By provider: fields that go into its requests as they are; own pools and other providers never see them.
    provider_options: Annotated[Mapping[str, Mapping[str, Any]], PlainValidator(_options)] = {}
    schema_in_prompt: bool | None = None  # false: the model is not told the schema that its answer is held to
    structured: bool | None = None  # events of a stream that tell each finished part of a JSON answer
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

    fixed = frozenset({"suffix", *_VLLM_FIXED, *_REFUSED})

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
    return read_chat(parse_object(body))


def read_chat(fields: dict[str, Any]) -> ChatRequest:
    """The chat request in the fields of a body, some of which are taken out of it; a tuple of canonical messages may
    stand for the plain ones. Raises InvalidRequest naming the field.
    """
    tools = _taken(fields, TOOL_FIELDS)
    options = _taken(fields, TEMPLATE_FIELDS)
    request = _parse(ChatRequest, fields, tool_use=read_tools(tools), template=read_template(options))
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs is for requests with logprobs: true", "top_logprobs")
    _check_form(request)
    last = request.messages[-1]
    if request.template.continue_final and (last.role != "assistant" or not last.content.strip() or last.tool_calls):
        raise InvalidRequest(
            "continue_final_message is for conversations that end with an assistant's message with a text and no calls",
            "continue_final_message",
        )
    if request.template.continue_final and request.tool_use is not None and request.tool_use.mode == "required":
        choice = "function_call" if request.tool_use.is_legacy else "tool_choice"
        raise InvalidRequest(
            f"continue_final_message goes on with a text, and {choice} makes the answer a call: send one of them",
            "continue_final_message",
        )
    return request


def _check_form(request: ChatRequest) -> None:
    form, tools = request.output_form, request.tool_use
    if form is not None and form.is_guided and tools is not None and tools.mode == "required":
        choice = "function_call" if tools.is_legacy else "tool_choice"
        raise InvalidRequest(
            f"{form.path} gives the whole answer a form, and {choice} makes it a call: send one of them", form.path
        )
    if request.structured and (form is None or not form.is_json or not request.stream):
        raise InvalidRequest(
            "structured is for streams (stream: true) of an answer that is JSON (response_format json_schema)",
            "structured",
        )


def parse_completion(body: bytes) -> CompletionRequest:
    """The completion request in `body`. Raises InvalidRequest naming the field."""
    request = _parse(CompletionRequest, parse_object(body))
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


def _parse(cls: type[RequestT], fields: dict[str, Any], **made: ToolUse | TemplateOptions | None) -> RequestT:
    for name in cls.made & fields.keys():
        raise InvalidRequest(f"unknown field {name}", name)
    form = read_form(_taken(fields, FORM_FIELDS))
    request = validated(cls, {**_without_fixed(fields, cls.fixed), "output_form": form, **made}, "")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is for requests with stream: true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs is for whole answers; leave out stream", "prompt_logprobs")
    return request


def _taken(fields: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The fields of these names, which leave `fields`."""
    if names.isdisjoint(fields):
        return {}
    return {name: fields.pop(name) for name in names & fields.keys()}


def _without_fixed(fields: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name not in known:
            kept[name] = value
        elif not is_default(value, FIXED[name]):
            raise InvalidRequest(f"{name} {_REFUSED.get(name, 'is not supported yet: leave it out')}", name)
    return kept
