"""Bodies of /v1/chat/completions, /v1/completions, and what stands in them: messages, parts, tools."""

from __future__ import annotations

from diptych.protos.openai import MAX_ANSWERS, ChatRequest, CompletionRequest
from diptych.protos.openai_messages import MAX_CALLS, MAX_ID_CHARS, MAX_MESSAGES
from diptych.protos.openai_parts import MAX_NAME_CHARS, MAX_PARTS
from diptych.protos.openai_template import EFFORTS, MAX_VALUE_CHARS, MAX_VARIABLES
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES, MAX_TOOLS

from .sampling import FORMS, MODEL, SAMPLING, TOKEN, TREATMENT, taken_at_default
from .shapes import (
    Field,
    JsonObject,
    Shape,
    any_object,
    either,
    fixed,
    flag,
    many,
    mapping,
    may,
    need,
    nullable,
    number,
    of_model,
    one_of,
    text,
)

NAME_OF_FUNCTION = text(1, 64, pattern="^[A-Za-z0-9_.-]*$", example="look_up")
ID = text(1, MAX_ID_CHARS)
_URL = text(1, pattern="^(https?://|data:[a-z]+/[a-zA-Z0-9.+-]+;base64,)", example="data:image/png;base64,aGVsbG8=")
BASE64 = text(1, pattern=r"^[A-Za-z0-9+/\n\r]*={0,2}$", example="aGVsbG8=")
_READS_TEXT = "the models served here read text: refused by name where it stands in a message"

BREAKPOINT = fixed("prompt_cache_breakpoint", [None, {"mode": "explicit"}], "prefixes are cached without being marked")
TEXT_PART = Shape(
    name="TextPart",
    words="Words.",
    fields=(need("type", one_of("text"), "which part"), need("text", text(), "the words"), BREAKPOINT),
)
REFUSAL_PART = Shape(
    name="RefusalPart",
    words="Words by which an assistant refused.",
    fields=(need("type", one_of("refusal"), "which part"), need("refusal", text(), "the words")),
)
IMAGE_URL = Shape(
    name="ImageUrl",
    words="Where an image is.",
    fields=(
        need("url", _URL, "an http(s) address or data in base64"),
        may("detail", one_of("auto", "low", "high"), "how closely to look"),
    ),
)
IMAGE_PART = Shape(
    name="ImagePart",
    words=f"An image; {_READS_TEXT}.",
    fields=(need("type", one_of("image_url"), "which part"), need("image_url", IMAGE_URL.ref, "the image"), BREAKPOINT),
)
INPUT_AUDIO = Shape(
    name="InputAudio",
    words="A sound.",
    fields=(need("data", BASE64, "the bytes in base64"), need("format", one_of("wav", "mp3"), "what they are")),
)
AUDIO_PART = Shape(
    name="AudioPart",
    words=f"A sound; {_READS_TEXT}.",
    fields=(
        need("type", one_of("input_audio"), "which part"),
        need("input_audio", INPUT_AUDIO.ref, "the sound"),
        BREAKPOINT,
    ),
)
INPUT_FILE = Shape(
    name="InputFile",
    words="A file, by its id or as data: one of file_id and file_data.",
    fields=(
        may("file_id", text(1, MAX_NAME_CHARS), "of an uploaded file"),
        may("file_data", _URL, "an http(s) address or data in base64"),
        may("filename", text(1, MAX_NAME_CHARS), "told to the model"),
    ),
)
FILE_PART = Shape(
    name="FilePart",
    words=f"A file; {_READS_TEXT}.",
    fields=(need("type", one_of("file"), "which part"), need("file", INPUT_FILE.ref, "the file"), BREAKPOINT),
)


def _content(*parts: Shape) -> JsonObject:
    return either(text(), many(either(*(part.ref for part in parts)), 1, MAX_PARTS))


CONTENT = _content(TEXT_PART, IMAGE_PART, AUDIO_PART, FILE_PART)
ASSISTANT_CONTENT = _content(TEXT_PART, REFUSAL_PART)
CALLED_FUNCTION = Shape(
    name="CalledFunction",
    words="Which function was called, and how.",
    fields=(
        need("name", ID, "the function"),
        need("arguments", text(), "the JSON of an object; empty stands for an empty one"),
        may("parsed_arguments", {}, "repeats `arguments`; not read"),
    ),
)
CALL = Shape(
    name="ToolCallGiven",
    words="A call that an assistant made before.",
    fields=(
        need("id", ID, "by which the result names it"),
        may("type", one_of("function"), "what was called", "function"),
        need("function", CALLED_FUNCTION.ref, "the function"),
        may("index", {}, "left over from a stream; not read"),
    ),
)


def _absent(name: str, values: tuple[object, ...] = (None,)) -> Field:
    return fixed(name, values, "is for assistant messages")


_ABSENT = (
    _absent("annotations", (None, [])),
    _absent("audio"),
    _absent("function_call"),
    _absent("parsed"),
    _absent("provider_specific_fields"),
    _absent("reasoning"),
    _absent("reasoning_content"),
    _absent("refusal"),
    _absent("tool_calls", (None, [])),
)
_PARTICIPANT = may("name", ID, "of the participant")
INPUT_MESSAGE = Shape(
    name="InputMessage",
    words="What a user, or who runs the application, says.",
    fields=(
        need("role", one_of("system", "developer", "user"), "who speaks"),
        need("content", CONTENT, "the words"),
        _PARTICIPANT,
        fixed("tool_call_id", [None], "is for tool messages"),
        *_ABSENT,
    ),
)
ASSISTANT_MESSAGE = Shape(
    name="AssistantMessage",
    words="What the model said before. Without calls and refusal it has a content.",
    fields=(
        need("role", one_of("assistant"), "who speaks"),
        may("content", ASSISTANT_CONTENT, "the words"),
        _PARTICIPANT,
        may("refusal", text(), "words by which it refused"),
        may("reasoning_content", text(), "its reasoning, where the template takes it"),
        may("reasoning", text(), "the same under its newer name"),
        may("tool_calls", many(CALL.ref, 0, MAX_CALLS), "the calls that it made"),
        may("function_call", CALLED_FUNCTION.ref, "the old name of one call"),
        fixed("tool_call_id", [None], "is for tool messages"),
        fixed("audio", [None], "the models served here write text"),
        fixed("annotations", [None, []], "the models served here write text"),
        may("parsed", {}, "repeats `content`; not read"),
        may("provider_specific_fields", {}, "what a provider wants back, as it came; other servers' is not read"),
    ),
)
TOOL_MESSAGE = Shape(
    name="ToolMessage",
    words="The result of a call.",
    fields=(
        need("role", one_of("tool"), "who speaks"),
        need("content", CONTENT, "the result"),
        need("tool_call_id", ID, "the id of a call in an assistant message before it"),
        may("name", ID, "of the function"),
        *_ABSENT,
    ),
)
FUNCTION_MESSAGE = Shape(
    name="FunctionMessage",
    words="The result of a call, in the old form.",
    fields=(
        need("role", one_of("function"), "who speaks"),
        need("content", CONTENT, "the result"),
        need("name", ID, "the function, which an assistant message before it called"),
        may("tool_call_id", {}, "not read"),
        *_ABSENT,
    ),
)
MESSAGE = either(INPUT_MESSAGE.ref, ASSISTANT_MESSAGE.ref, TOOL_MESSAGE.ref, FUNCTION_MESSAGE.ref)
MESSAGES = need("messages", many(MESSAGE, 1, MAX_MESSAGES), "the conversation")

FUNCTION = Shape(
    name="Function",
    words="A function that the model may call.",
    fields=(
        need("name", NAME_OF_FUNCTION, "unlike the other functions' names"),
        may("description", text(), "told to the model"),
        may("parameters", any_object(), f"the schema of its arguments; all schemas together {MAX_SCHEMA_BYTES} bytes"),
        may("strict", flag(), "changes nothing: arguments follow their schema whatever it says"),
    ),
)
TOOL = Shape(
    name="Tool",
    words="A tool; this server has none of its own.",
    fields=(need("type", one_of("function"), "a function"), need("function", FUNCTION.ref, "the function")),
)
FUNCTION_NAME = Shape(
    name="FunctionName", words="One of the request's functions.", fields=(need("name", NAME_OF_FUNCTION, "which"),)
)
NAMED_TOOL = Shape(
    name="NamedTool",
    words="The function that is called.",
    fields=(need("type", one_of("function"), "a function"), need("function", FUNCTION_NAME.ref, "which")),
)
ALLOWED = Shape(
    name="AllowedToolList",
    words="Some of the request's functions.",
    fields=(
        need("mode", one_of("auto", "required"), "whether one must be called"),
        need("tools", many(NAMED_TOOL.ref, 1, MAX_TOOLS), "those that may be called"),
    ),
)
ALLOWED_TOOLS = Shape(
    name="AllowedTools",
    words="The choice among some of the request's functions.",
    fields=(need("type", one_of("allowed_tools"), "which choice"), need("allowed_tools", ALLOWED.ref, "the functions")),
)
TOOLS = (
    may("tools", many(TOOL.ref, 0, MAX_TOOLS), "the functions that the model may call"),
    may(
        "tool_choice",
        either(one_of("none", "auto", "required"), NAMED_TOOL.ref, ALLOWED_TOOLS.ref),
        "whether a function is called, and which",
        "auto with tools, else none",
    ),
    may("parallel_tool_calls", flag(), "one answer may have several calls", "true"),
    may("functions", many(FUNCTION.ref, 0, MAX_TOOLS), "the old form of tools; the answer has `function_call`"),
    may("function_call", either(one_of("none", "auto"), FUNCTION_NAME.ref), "the old form of tool_choice"),
)
VARIABLES = mapping(
    either(text(0, MAX_VALUE_CHARS), number(), flag(), {"type": "null"}),
    most=MAX_VARIABLES,
    names={"pattern": "^[a-z_]{1,32}$"},
)
TEMPLATE = (
    may(
        "reasoning_effort",
        one_of(*EFFORTS),
        "told to the chat template, xhigh and max as high; `none` switches reasoning off where the template can; "
        "told to providers as it is, or the nearest with a note",
    ),
    may("chat_template_kwargs", VARIABLES, "variables of the chat template, which must read them"),
    may("add_generation_prompt", flag(), "the prompt ends with the beginning of the assistant's turn", "true"),
    may("continue_final_message", flag(), "the answer goes on with the last message, an assistant's", "false"),
)


def _chat(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(ChatRequest, name)), words=words, default=default)


def _completion(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(CompletionRequest, name)), words=words, default=default)


CHAT = Shape(
    name="ChatCompletionRequest",
    words="A conversation that the model goes on with.",
    fields=(
        MODEL,
        MESSAGES,
        _chat("max_completion_tokens", "tokens of an answer at most", "`router.default_max_tokens`, cut to what fits"),
        _chat("max_tokens", "the old name of max_completion_tokens"),
        _chat("logprobs", "tell the logprobs of the answer's tokens", "false"),
        _chat("top_logprobs", "with so many alternatives each; with logprobs: true", "0"),
        *SAMPLING,
        *FORMS,
        _chat("schema_in_prompt", "false: the model is not told the schema that its answer is held to", "true"),
        _chat("structured", "events of a stream tell each finished part of an answer that is JSON", "false"),
        *TOOLS,
        *TEMPLATE,
        may("provider_options", mapping(any_object()), "by provider: fields that go into its requests as they are"),
        _chat("include_reasoning", "false: the answer comes without its reasoning", "true"),
        _chat("reasoning_budget", "tokens of reasoning at most; then it is ended"),
        *TREATMENT,
        *taken_at_default(ChatRequest.fixed),
    ),
)
_PROMPT = either(text(1), many(TOKEN, 1))
COMPLETION = Shape(
    name="CompletionRequest",
    words="A text, or several, that the model goes on with.",
    fields=(
        MODEL,
        need(
            "prompt",
            either(text(1), many(TOKEN, 1), many(_PROMPT, 1, MAX_ANSWERS)),
            f"a text, token ids, or a list of either; each gets n answers, {MAX_ANSWERS} together at most",
        ),
        _completion("max_tokens", "tokens of an answer at most; 0 with echo scores a prompt", "16"),
        _completion("logprobs", "the logprobs of the answer's tokens, with so many alternatives", "none"),
        _completion("echo", "the prompt is the beginning of the answer", "false"),
        _completion("best_of", "must equal n: every choice is returned", "n"),
        *SAMPLING,
        *FORMS,
        *TREATMENT,
        *taken_at_default(CompletionRequest.fixed),
    ),
)
