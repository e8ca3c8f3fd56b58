"""Bodies of /v1/messages and /v1/messages/count_tokens: Anthropic's conversation, blocks and tools."""

from __future__ import annotations

from diptych.protos.anthropic_messages import EFFORT_NAMES as EFFORTS
from diptych.protos.anthropic_messages import OWN, REFUSED, MessagesRequest
from diptych.protos.anthropic_tools import MAX_EXAMPLES
from diptych.protos.openai_messages import MAX_ID_CHARS, MAX_MESSAGES
from diptych.protos.openai_parts import MAX_NAME_CHARS, MAX_PARTS
from diptych.protos.openai_sampling import MAX_STOP_CHARS, MAX_STOPS
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES, MAX_TOOLS

from .chat import BASE64, NAME_OF_FUNCTION
from .sampling import SCHEMA
from .shapes import (
    Field,
    JsonObject,
    Shape,
    any_object,
    either,
    fixed,
    flag,
    many,
    may,
    need,
    nullable,
    of_model,
    one_of,
    text,
    whole,
)

_READS_TEXT = "models here read text: refused by name where it stands in a message"
_ID = text(1, MAX_ID_CHARS)
_ADDRESS = text(1, pattern="^(https?://|data:[a-z]+/[a-zA-Z0-9.+-]+;base64,)", example="https://example.com/a")


def _type(value: str, words: str = "which kind") -> Field:
    return need("type", one_of(value), words)


CACHE_CONTROL = Shape(
    name="CacheControl",
    words="Goes to providers that have it; own pools keep each prompt's beginning without being asked.",
    fields=(_type("ephemeral"), may("ttl", one_of("5m", "1h"), "of providers; 5m by default")),
)
_CACHE = may("cache_control", CACHE_CONTROL.ref, "for providers; own pools keep prefixes anyway")
_NO_CITATIONS = fixed("citations", [None, []], "are not read by models here")
CITATIONS = Shape(
    name="CitationsAsked",
    words="Answers have no citations here.",
    fields=(fixed("enabled", [None, False], "answers have no citations"),),
)
_CITED = may("citations", CITATIONS.ref, "answers have none")
_NO_TOOLSET = fixed("toolset_name", [None], "there are no toolsets here")
TEXT_BLOCK = Shape(
    name="TextBlock", words="Words.", fields=(_type("text"), need("text", text(), "the words"), _CACHE, _NO_CITATIONS)
)
URL_SOURCE = Shape(
    name="UrlSource", words="At an address.", fields=(_type("url"), need("url", _ADDRESS, "where it is"))
)
FILE_SOURCE = Shape(
    name="FileSource",
    words="An uploaded file.",
    fields=(_type("file"), need("file_id", text(1, MAX_NAME_CHARS), "which one")),
)
IMAGE_DATA = Shape(
    name="ImageData",
    words="An image in base64.",
    fields=(
        _type("base64"),
        need("media_type", one_of("image/jpeg", "image/png", "image/gif", "image/webp"), "what the bytes are"),
        need("data", BASE64, "the bytes"),
    ),
)
PDF_DATA = Shape(
    name="PdfData",
    words="A PDF in base64.",
    fields=(
        _type("base64"),
        need("media_type", one_of("application/pdf"), "what the bytes are"),
        need("data", BASE64, "the bytes"),
    ),
)
PLAIN_TEXT = Shape(
    name="PlainText",
    words="A text.",
    fields=(
        _type("text"),
        need("media_type", one_of("text/plain"), "what it is"),
        need("data", text(), "the text"),
    ),
)
IMAGE_BLOCK = Shape(
    name="ImageBlock",
    words=f"An image; {_READS_TEXT}.",
    fields=(
        _type("image"),
        need("source", either(IMAGE_DATA.ref, URL_SOURCE.ref, FILE_SOURCE.ref), "the image"),
        _CACHE,
        fixed("transformations", [None, {}], "send the image in the size that is to be read"),
    ),
)
CONTENT_SOURCE = Shape(
    name="ContentSource",
    words="Blocks.",
    fields=(
        _type("content"),
        need("content", either(text(), many(either(TEXT_BLOCK.ref, IMAGE_BLOCK.ref), 1, MAX_PARTS)), "the blocks"),
    ),
)
DOCUMENT_BLOCK = Shape(
    name="DocumentBlock",
    words="A document; a PDF is refused by name, as models here read text.",
    fields=(
        _type("document"),
        need(
            "source",
            either(PLAIN_TEXT.ref, CONTENT_SOURCE.ref, PDF_DATA.ref, URL_SOURCE.ref, FILE_SOURCE.ref),
            "the document",
        ),
        may("title", text(), "told to the model"),
        may("context", text(), "told to the model"),
        _CACHE,
        _CITED,
    ),
)
SEARCH_RESULT = Shape(
    name="SearchResultBlock",
    words="A result of a search, told to the model in words.",
    fields=(
        _type("search_result"),
        need("source", text(1), "where it was found"),
        need("title", text(1), "its title"),
        need("content", either(text(), many(TEXT_BLOCK.ref, 1, MAX_PARTS)), "its text"),
        _CACHE,
        _CITED,
    ),
)
_READABLE = (TEXT_BLOCK.ref, IMAGE_BLOCK.ref, DOCUMENT_BLOCK.ref, SEARCH_RESULT.ref)
TOOL_RESULT = Shape(
    name="ToolResultBlock",
    words="The result of a call; results come first in a user's message.",
    fields=(
        _type("tool_result"),
        need("tool_use_id", _ID, "the id of a tool_use in an assistant message before it"),
        may("content", either(text(), many(either(*_READABLE), 0, MAX_PARTS)), "the result"),
        may("is_error", flag(), "the call failed", "false"),
        _CACHE,
        _NO_TOOLSET,
    ),
)
DIRECT = Shape(name="DirectCaller", words="The model itself.", fields=(_type("direct"),))
TOOL_USE = Shape(
    name="ToolUseBlock",
    words="A call that the model made.",
    fields=(
        _type("tool_use"),
        need("id", _ID, "by which the result names it"),
        need("name", _ID, "the tool"),
        need("input", any_object(), "its input"),
        _CACHE,
        may("caller", DIRECT.ref, "who called"),
        _NO_TOOLSET,
    ),
)
THINKING_BLOCK = Shape(
    name="ThinkingBlock",
    words="What the model thought.",
    fields=(
        _type("thinking"),
        need("thinking", text(), "the text; empty where the signature carries it"),
        may("signature", text(), "as it came"),
    ),
)
REDACTED_BLOCK = Shape(
    name="RedactedThinkingBlock",
    words="What a provider's model thought and does not tell; refused by own models, which cannot read it.",
    fields=(_type("redacted_thinking"), need("data", text(), "as it came")),
)
USER_TURN = Shape(
    name="UserTurn",
    words="What the user says, and results of tools.",
    fields=(
        need("role", one_of("user"), "who speaks"),
        need("content", either(text(), many(either(*_READABLE, TOOL_RESULT.ref), 1, MAX_PARTS)), "the blocks"),
    ),
)
ASSISTANT_TURN = Shape(
    name="AssistantTurn",
    words="What the model said; the last one begins the answer.",
    fields=(
        need("role", one_of("assistant"), "who speaks"),
        need(
            "content",
            either(
                text(), many(either(TEXT_BLOCK.ref, THINKING_BLOCK.ref, REDACTED_BLOCK.ref, TOOL_USE.ref), 0, MAX_PARTS)
            ),
            "the blocks",
        ),
    ),
)
SYSTEM_TURN = Shape(
    name="SystemTurn",
    words="An instruction amid the conversation.",
    fields=(
        need("role", one_of("system"), "who speaks"),
        need("content", either(text(), many(TEXT_BLOCK.ref, 1, MAX_PARTS)), "the words"),
    ),
)
TOOL = Shape(
    name="AnthropicTool",
    words="A tool that the client runs. Tools that a server runs are refused by name.",
    fields=(
        need("name", NAME_OF_FUNCTION, "unlike the other tools' names"),
        need("input_schema", any_object(), f"a schema; all together {MAX_SCHEMA_BYTES} bytes"),
        Field(name="type", schema=one_of("custom", None), words="whose tool it is", default="custom"),
        may("description", text(), "told to the model"),
        may("input_examples", many(any_object(), 0, MAX_EXAMPLES), "told to the model"),
        may("strict", flag(), "changes nothing: inputs follow their schema whatever it says"),
        may("eager_input_streaming", flag(), "changes nothing: inputs are streamed as they are written"),
        fixed("defer_loading", [None, False], "there is no search among tools here"),
        fixed("allowed_callers", [None, ["direct"]], "no program calls tools here"),
        _CACHE,
    ),
)
_SERIAL = may("disable_parallel_tool_use", flag(), "at most one call", "false")
AUTO = Shape(name="ToolChoiceAuto", words="Calls or a text.", fields=(_type("auto"), _SERIAL))
ANY = Shape(name="ToolChoiceAny", words="At least one call.", fields=(_type("any"), _SERIAL))
NONE = Shape(name="ToolChoiceNone", words="No call.", fields=(_type("none"),))
NAMED = Shape(
    name="ToolChoiceTool", words="This tool.", fields=(_type("tool"), need("name", NAME_OF_FUNCTION, "which"), _SERIAL)
)
_SHOWN = may("display", one_of("summarized", "omitted"), "omitted: the text is left out; else it is whole")
THINKING_ON = Shape(
    name="ThinkingEnabled",
    words="The model thinks before it answers, so far as its template can.",
    fields=(
        _type("enabled"),
        need("budget_tokens", whole(1, 2**31 - 1), "tokens of thinking at most; less than max_tokens"),
        _SHOWN,
    ),
)
THINKING_ADAPTIVE = Shape(
    name="ThinkingAdaptive", words="As enabled, without a budget.", fields=(_type("adaptive"), _SHOWN)
)
THINKING_OFF = Shape(name="ThinkingDisabled", words="It does not think.", fields=(_type("disabled"),))
FORMAT = Shape(
    name="OutputFormat",
    words="A schema that the answer is held to, token by token.",
    fields=(
        _type("json_schema"),
        need("schema", SCHEMA, f"a JSON schema of at most {MAX_SCHEMA_BYTES} bytes"),
    ),
)
OUTPUT_CONFIG = Shape(
    name="OutputConfig",
    words="How the answer is given.",
    fields=(
        may(
            "effort",
            one_of(*EFFORTS),
            "told to the chat template, xhigh and max as high; to providers as it is, or the nearest with a note",
        ),
        may("format", FORMAT.ref, "the form of the answer's text"),
    ),
)
METADATA = Shape(
    name="AnthropicMetadata",
    words="About the request.",
    fields=(may("user_id", text(0, 512), "a label; checked and dropped"),),
)


def _own(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(MessagesRequest, name)), words=words, default=default)


_OWN_WORDS = {
    "first_token_timeout_s": "seconds to the first token; 504 afterwards",
    "min_p": "tokens less likely than this part of the likeliest are not drawn",
    "priority": "lower is sooner",
    "seed": "the same seed, prompt and model give the same answer",
    "timeout_s": "seconds for the whole answer; 504 afterwards",
}
assert _OWN_WORDS.keys() == OWN
_CONVERSATION: tuple[Field, ...] = (
    need("model", of_model(MessagesRequest, "model"), "a name of /v1/models"),
    need(
        "messages",
        many(either(USER_TURN.ref, ASSISTANT_TURN.ref, SYSTEM_TURN.ref), 1, MAX_MESSAGES),
        "the conversation; neighbouring messages of one who speaks are one turn",
    ),
    may("system", either(text(), many(TEXT_BLOCK.ref, 0, MAX_PARTS)), "instructions"),
    may("tools", many(TOOL.ref, 0, MAX_TOOLS), "what the model may call"),
    may("tool_choice", either(AUTO.ref, ANY.ref, NAMED.ref, NONE.ref), "whether a tool is called, and which", "auto"),
    may("thinking", either(THINKING_ON.ref, THINKING_ADAPTIVE.ref, THINKING_OFF.ref), "whether it thinks", "disabled"),
    may("output_config", OUTPUT_CONFIG.ref, "form and effort"),
    may("output_format", FORMAT.ref, "the old name of output_config.format"),
    _CACHE,
    fixed("speed", [None, "standard"], "every answer comes as fast as it can"),
    *(fixed(name, values, words) for name, (values, words) in sorted(REFUSED.items())),
    fixed("thread", [None], "no conversation is kept here: send all of it"),
)
_STOPS: JsonObject = many(text(1, MAX_STOP_CHARS), 0, MAX_STOPS)
MESSAGES = Shape(
    name="MessagesRequest",
    words="A conversation that the model goes on with, in Anthropic's form.",
    fields=(
        need("max_tokens", of_model(MessagesRequest, "max_tokens"), "tokens of the answer at most, thinking included"),
        *_CONVERSATION,
        may("stop_sequences", _STOPS, "texts that end the answer; they are no part of it"),
        may("stream", flag(), "the answer as server-sent events", "false"),
        _own("temperature", "0 takes the likeliest token", "the model's, else 1"),
        _own("top_p", "tokens are drawn from the likeliest that together have this probability", "the model's, else 1"),
        may("top_k", whole(-1, 2**31 - 1), "drawn from so many of the likeliest; 0 and -1: from all", "the model's"),
        may("metadata", METADATA.ref, "about the request"),
        may("service_tier", one_of("auto", "standard_only"), "changes nothing: there is one tier"),
        *(_own(name, words) for name, words in _OWN_WORDS.items()),
    ),
)
COUNT = Shape(
    name="CountTokensRequest",
    words="A conversation whose tokens are to be counted.",
    fields=_CONVERSATION,
)
