"""Bodies of /v1/responses and /v1/responses/input_tokens: items, parts, tools, the form of the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from diptych.protos.openai import ChatRequest
from diptych.protos.openai_messages import MAX_ID_CHARS
from diptych.protos.openai_parts import MAX_NAME_CHARS, MAX_PARTS
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES, MAX_TOOLS
from diptych.protos.responses import _REFUSED as REASONS
from diptych.protos.responses import CHAT_FIELDS, COUNTED, FIXED, Include, ResponsesFields
from diptych.protos.responses_items import MAX_ITEMS

from .chat import BASE64, BREAKPOINT, CHAT, INPUT_AUDIO, NAME_OF_FUNCTION, VARIABLES
from .sampling import JSON_SCHEMA_FORM, METADATA, OBJECT_FORMAT, TEXT_FORMAT
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
)

_READS_TEXT = "models here read text: refused by name where it stands in an item"
_ID = text(1, MAX_ID_CHARS)
_ADDRESS = text(1, pattern="^(https?://|data:[a-z]+/[a-zA-Z0-9.+-]+;base64,)", example="https://example.com/a")
_DATA = text(1, pattern="^data:[a-z]+/[a-zA-Z0-9.+-]+;base64,", example="data:application/pdf;base64,aGVsbG8=")
_ITEM_ID = may("id", _ID, "unlike those of the other items; where it is left out, one is made")
_STATUS = may("status", one_of("in_progress", "completed", "incomplete"), "of an item that came from here")
_NAMESPACE = fixed("namespace", [None], "functions have none here")
_CALLER = fixed("caller", [None, {"type": "direct"}], "no program calls functions here")


def _type(value: str, words: str = "which kind") -> Field:
    return need("type", one_of(value), words)


INPUT_TEXT = Shape(
    name="InputText", words="Words.", fields=(_type("input_text"), need("text", text(), "the words"), BREAKPOINT)
)
INPUT_IMAGE = Shape(
    name="InputImage",
    words=f"An image, by one of image_url and file_id; {_READS_TEXT}.",
    fields=(
        _type("input_image"),
        may("image_url", _ADDRESS, "an http(s) address or data in base64"),
        may("file_id", _ID, "of an uploaded file"),
        may("detail", one_of("auto", "low", "high", "original"), "how closely to look"),
        BREAKPOINT,
    ),
)
INPUT_FILE = Shape(
    name="InputFilePart",
    words=f"A file, by one of file_data, file_id and file_url; {_READS_TEXT}.",
    fields=(
        _type("input_file"),
        may("file_data", either(_DATA, BASE64), "data in base64, with its type before it or without"),
        may("file_id", _ID, "of an uploaded file"),
        may("file_url", _ADDRESS, "where it is"),
        may("filename", text(1, MAX_NAME_CHARS), "told to the model"),
        may("detail", one_of("auto", "low", "high"), "how closely to look"),
        BREAKPOINT,
    ),
)
INPUT_SOUND = Shape(
    name="InputAudioPart",
    words=f"A sound; {_READS_TEXT}.",
    fields=(_type("input_audio"), need("input_audio", INPUT_AUDIO.ref, "the sound"), BREAKPOINT),
)
OUTPUT_TEXT = Shape(
    name="OutputTextGiven",
    words="Words that the model said.",
    fields=(
        _type("output_text"),
        need("text", text(), "the words"),
        may("annotations", many({}, 0, MAX_PARTS), "kept and told again"),
        may("logprobs", many({}), "not read"),
        may("parsed", {}, "repeats the text; not read"),
    ),
)
OUTPUT_REFUSAL = Shape(
    name="RefusalGiven",
    words="Words by which the model refused.",
    fields=(_type("refusal"), need("refusal", text(), "the words")),
)
_ASKED = either(INPUT_TEXT.ref, INPUT_IMAGE.ref, INPUT_FILE.ref, INPUT_SOUND.ref)
_IS_MESSAGE = Field(name="type", schema=one_of("message", None), words="which kind", default="message")
MESSAGE = Shape(
    name="InputMessageItem",
    words="What a user, or who runs the application, says.",
    fields=(
        _IS_MESSAGE,
        need("role", one_of("user", "system", "developer"), "who speaks"),
        need("content", either(text(), many(_ASKED, 1, MAX_PARTS)), "the words"),
        may("phase", one_of("commentary", "final_answer"), "kept and told again"),
        _ITEM_ID,
        _STATUS,
    ),
)
ANSWER = Shape(
    name="OutputMessageItem",
    words="What the model said before.",
    fields=(
        _IS_MESSAGE,
        need("role", one_of("assistant"), "who speaks"),
        need("content", either(text(), many(either(OUTPUT_TEXT.ref, OUTPUT_REFUSAL.ref), 0, MAX_PARTS)), "the words"),
        may("phase", one_of("commentary", "final_answer"), "kept and told again"),
        _ITEM_ID,
        _STATUS,
    ),
)
CALL = Shape(
    name="FunctionCallItem",
    words="A call that the model made before.",
    fields=(
        _type("function_call"),
        need("call_id", _ID, "by which the result names it"),
        need("name", _ID, "the function"),
        need("arguments", text(), "the JSON of an object; empty stands for an empty one"),
        may("parsed_arguments", {}, "repeats `arguments`; not read"),
        fixed("async", [None, False], "calls are not made in the background"),
        _CALLER,
        _NAMESPACE,
        _ITEM_ID,
        _STATUS,
    ),
)
RESULT = Shape(
    name="FunctionCallOutputItem",
    words="The result of a call.",
    fields=(
        _type("function_call_output"),
        need("call_id", _ID, "of a function_call before it"),
        need("output", either(text(), many(_ASKED, 1, MAX_PARTS)), "the result"),
        may("name", _ID, "of the function"),
        _CALLER,
        _NAMESPACE,
        fixed("created_by", [None], "is not kept"),
        _ITEM_ID,
        _STATUS,
    ),
)
SUMMARY_PART = Shape(
    name="SummaryPart",
    words="A summary of reasoning.",
    fields=(_type("summary_text"), need("text", text(), "the words")),
)
REASONING_PART = Shape(
    name="ReasoningPart", words="Reasoning.", fields=(_type("reasoning_text"), need("text", text(), "the words"))
)
REASONING_ITEM = Shape(
    name="ReasoningItem",
    words="What the model thought before.",
    fields=(
        _type("reasoning"),
        may("summary", many(SUMMARY_PART.ref, 0, MAX_PARTS), "summaries of it"),
        may("content", many(REASONING_PART.ref, 0, MAX_PARTS), "the reasoning itself"),
        may("encrypted_content", text(1), "as this server told it to this tenant"),
        _ITEM_ID,
        _STATUS,
    ),
)
REFERENCE = Shape(
    name="ItemReference",
    words="An item of a stored response.",
    fields=(
        Field(name="type", schema=one_of("item_reference", None), words="which kind", default="item_reference"),
        need("id", _ID, "of the item"),
    ),
)
ITEM = either(MESSAGE.ref, ANSWER.ref, CALL.ref, RESULT.ref, REASONING_ITEM.ref, REFERENCE.ref)
TOOL = Shape(
    name="FunctionTool",
    words="A function that the model may call. Tools that a server runs are refused by name.",
    fields=(
        _type("function"),
        need("name", NAME_OF_FUNCTION, "unlike the other functions' names"),
        may("description", text(), "told to the model"),
        may("parameters", any_object(), f"the schema of its arguments; all schemas together {MAX_SCHEMA_BYTES} bytes"),
        may("strict", flag(), "changes nothing: arguments follow their schema whatever it says"),
        fixed("allowed_callers", [None, ["direct"]], "no program calls functions here"),
        fixed("async", [None, False], "calls are not made in the background"),
        fixed("defer_loading", [None, False], "there is no search among tools here"),
        fixed("output_schema", [None], "results are told as they come"),
    ),
)
NAMED_FUNCTION = Shape(
    name="NamedFunction",
    words="The function that is called.",
    fields=(_type("function"), need("name", NAME_OF_FUNCTION, "which")),
)
ALLOWED_FUNCTIONS = Shape(
    name="AllowedFunctions",
    words="The choice among some of the request's functions.",
    fields=(
        _type("allowed_tools"),
        need("mode", one_of("auto", "required"), "whether one must be called"),
        need("tools", many(NAMED_FUNCTION.ref, 1, MAX_TOOLS), "those that may be called"),
    ),
)
SCHEMA_FORMAT = Shape(
    name="ResponseSchemaFormat",
    words="JSON by a schema.",
    fields=(_type("json_schema"), *JSON_SCHEMA_FORM.fields),
)
TEXT = Shape(
    name="ResponseText",
    words="How the answer's text is.",
    fields=(
        may("format", either(TEXT_FORMAT.ref, OBJECT_FORMAT.ref, SCHEMA_FORMAT.ref), "its form", "text"),
        fixed("verbosity", ["medium", None], "no model here knows another"),
    ),
)
_EFFORT = next(one for one in CHAT.fields if one.name == "reasoning_effort")
REASONING = Shape(
    name="ResponseReasoning",
    words="How the model reasons.",
    fields=(
        Field(name="effort", schema=_EFFORT.schema, words=_EFFORT.words),
        fixed("summary", [None, "auto"], "the reasoning itself is told, no summary of it"),
        fixed("generate_summary", [None, "auto"], "the old name of summary"),
        fixed("context", [None, "auto"], "the chat template decides which reasoning the model is shown again"),
        fixed("mode", [None, "standard"], "there is one mode"),
    ),
)
STREAM_OPTIONS = Shape(
    name="ResponseStreamOptions",
    words="Nothing that can be turned on.",
    fields=(fixed("include_obfuscation", [None, False], "padding against traffic analysis is not offered"),),
)


def _own(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(ResponsesFields, name)), words=words, default=default)


_INPUT: JsonObject = nullable(either(text(), many(ITEM, 0, MAX_ITEMS)))
INCLUDES = one_of(*get_args(Include))
_CONVERSATION: tuple[Field, ...] = (
    need("model", of_model(ResponsesFields, "model"), "a name of /v1/models"),
    Field(name="input", schema=_INPUT, words="what is said; may be left out with previous_response_id"),
    _own("instructions", "before all else; not kept for the next response"),
    may("previous_response_id", text(), "a stored response that this one goes on from"),
    may("tools", many(TOOL.ref, 0, MAX_TOOLS), "the functions that the model may call"),
    may(
        "tool_choice",
        either(one_of("none", "auto", "required"), NAMED_FUNCTION.ref, ALLOWED_FUNCTIONS.ref),
        "whether a function is called, and which",
        "auto",
    ),
    may("parallel_tool_calls", flag(), "one answer may have several calls", "true"),
    may("text", TEXT.ref, "how the answer's text is"),
    may("reasoning", REASONING.ref, "how the model reasons"),
    _own("truncation", "auto: the oldest turns go where the conversation does not fit", "disabled"),
    fixed("conversation", FIXED["conversation"], REASONS["conversation"].partition(": ")[2]),
)
_TOLD = dict.fromkeys(("safety_identifier", "user"), "a label that is kept and told again")
_WORDS = {"access_programs": "OpenAI's own", "image": "no model here draws"}
RESPONSE = Shape(
    name="ResponseRequest",
    words="A conversation that the model goes on with, in items.",
    fields=(
        *_CONVERSATION,
        _own("max_output_tokens", "tokens of the answer at most, reasoning included", "`router.default_max_tokens`"),
        _own("store", "the response is kept, so that others go on from it", "true"),
        _own("background", "the answer comes at once, and the work goes on; for stored ones", "false"),
        _own("stream", "the answer as server-sent events", "false"),
        may("stream_options", STREAM_OPTIONS.ref, "for requests with stream: true"),
        may("include", many(INCLUDES, 0, 64), "what the response tells besides"),
        _own("top_logprobs", 'so many alternatives; with include: ["message.output_text.logprobs"]', "0"),
        may("metadata", METADATA, "labels that are kept and told again"),
        _own("max_tool_calls", "of tools that a server runs, which are none: never reached"),
        _own("prompt_cache_key", "requests of one key go to where their prefixes are"),
        may("chat_template_kwargs", VARIABLES, "variables of the chat template, which must read them"),
        *(replace(one, words=_TOLD.get(one.name, one.words)) for one in CHAT.fields if one.name in CHAT_FIELDS),
        *(
            fixed(name, values, _WORDS.get(name) or REASONS.get(name, ": not supported").partition(": ")[2])
            for name, values in FIXED.items()
            if name != "conversation"
        ),
    ),
)
assert {one.name for one in _CONVERSATION} == COUNTED
assert {*ChatRequest.model_fields} >= CHAT_FIELDS
INPUT_TOKENS = Shape(
    name="InputTokensRequest", words="A conversation whose tokens are to be counted.", fields=_CONVERSATION
)
