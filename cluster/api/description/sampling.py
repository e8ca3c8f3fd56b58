"""The fields that chat and completions share: what chooses tokens, the form of the answer, how a request is treated."""

from __future__ import annotations

from diptych.protos.openai import _REFUSED as REASONS
from diptych.protos.openai import FIXED, MAX_LABELS, GenerationRequest, StreamOptions
from diptych.protos.openai_output import MAX_CHOICE_ENTRIES
from diptych.protos.openai_sampling import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASED,
    MAX_STOP_CHARS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    SamplingFields,
)
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES

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
    whole,
)

_OWN = "the model's generation_config.json"
TOKEN = whole(0, 2**31 - 1)
STOP_TEXT = text(1, MAX_STOP_CHARS)
# Where an object is meant, vLLM's clients send it as the JSON of one.
SCHEMA = either(any_object(), text(2, MAX_SCHEMA_BYTES))


def _sampled(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(SamplingFields, name)), words=words, default=default)


def _asked(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(GenerationRequest, name)), words=words, default=default)


SAMPLING = (
    _sampled("temperature", "0 takes the likeliest token; above, how flat the distribution is", f"{_OWN}, else 1"),
    _sampled("top_p", "tokens are drawn from the likeliest that together have this probability", f"{_OWN}, else 1"),
    may(
        "top_k",
        whole(-1, 2**31 - 1),
        "tokens are drawn from so many of the likeliest; 0 and -1: from all",
        f"{_OWN}, else all",
    ),
    _sampled("min_p", "tokens less likely than this part of the likeliest are not drawn", f"{_OWN}, else 0"),
    _sampled("seed", "the same seed, prompt and model give the same answer", "a fresh one"),
    _sampled("repetition_penalty", "logits of tokens that are there already are divided by it", f"{_OWN}, else 1"),
    _sampled("presence_penalty", "taken from the logits of tokens that the answer has already", "0"),
    _sampled("frequency_penalty", "likewise, as often as the answer has them", "0"),
    may(
        "logit_bias",
        mapping(number(-100, 100), most=MAX_BIASED, names={"pattern": "^(0|[1-9][0-9]{0,9})$"}),
        "added to the logits of tokens, by their ids; ids of the model's vocabulary",
    ),
    may("bad_words", many(STOP_TEXT, most=MAX_BAD_WORDS), "texts that the answer does not contain"),
    may("allowed_token_ids", many(TOKEN, 1, MAX_ALLOWED_TOKENS), "the only tokens that may be generated"),
    may(
        "stop",
        either(STOP_TEXT, many(STOP_TEXT, most=MAX_STOPS)),
        "texts that end the answer where the first of them is complete; they are no part of it",
    ),
    may("stop_token_ids", many(TOKEN, most=MAX_STOP_TOKENS), "tokens that end the answer, as the model's own do"),
    _sampled("include_stop_str_in_output", "the text or token that ended the answer is part of it", "false"),
    _sampled("min_tokens", "nothing ends the answer before it has so many tokens; at most max_tokens", "0"),
    _sampled("ignore_eos", "the model's end tokens end nothing", "false"),
    _sampled(
        "prompt_logprobs",
        "the logprobs of the prompt's tokens, with so many alternatives; for whole answers",
        "none",
    ),
    _sampled("n", "how many answers; each has a seed of its own", "1"),
)

STREAM_OPTIONS = Shape(
    name="StreamOptions",
    words="What a stream tells besides its text.",
    fields=(
        Field(
            name="include_usage",
            schema=nullable(of_model(StreamOptions, "include_usage")),
            words="one more chunk with the token counts before the end",
            default="false",
        ),
        fixed("include_obfuscation", [None, False], "padding against traffic analysis is not offered"),
    ),
)

JSON_SCHEMA_FORM = Shape(
    name="JsonSchemaForm",
    words="A schema that the answer is held to, token by token.",
    fields=(
        need("name", text(1, 64, pattern=r"^[^\x00-\x1f\x7f]*$"), "told to the model"),
        may("description", text(0, 4096), "told to the model"),
        need(
            "schema",
            SCHEMA,
            f"a JSON schema of at most {MAX_SCHEMA_BYTES} bytes; structured-output-keywords.md: what is enforced",
        ),
        may("strict", flag(), "changes nothing: the schema is enforced whatever it says"),
    ),
)
TEXT_FORMAT = Shape(
    name="TextFormat", words="Any text.", fields=(need("type", one_of("text"), "what kind of form this is"),)
)
OBJECT_FORMAT = Shape(
    name="JsonObjectFormat",
    words="Any JSON object.",
    fields=(need("type", one_of("json_object"), "what kind of form this is"),),
)
SCHEMA_FORMAT = Shape(
    name="JsonSchemaFormat",
    words="JSON by a schema.",
    fields=(
        need("type", one_of("json_schema"), "what kind of form this is"),
        need("json_schema", JSON_SCHEMA_FORM.ref, "the schema and what it is called"),
    ),
)
_CHOICES = many(text(1), 1, MAX_CHOICE_ENTRIES)
_OFF = "a setting of another server's backend"
STRUCTURED_OUTPUTS = Shape(
    name="StructuredOutputs",
    words="vLLM's way to give an answer a form. One of json, regex, choice, grammar and json_object must be there.",
    fields=(
        may("json", SCHEMA, "as guided_json"),
        may("regex", text(1, MAX_SCHEMA_BYTES), "as guided_regex"),
        may("choice", _CHOICES, "as guided_choice"),
        may("grammar", text(1, MAX_SCHEMA_BYTES), "as guided_grammar"),
        may("json_object", flag(), "any JSON object"),
        fixed("backend", [None, "auto"], _OFF),
        fixed("disable_additional_properties", [None, False], _OFF),
        fixed("disable_any_whitespace", [None, False], _OFF),
        fixed("disable_fallback", [None, False], _OFF),
        fixed("structural_tag", [None], _OFF),
        fixed("whitespace_pattern", [None], _OFF),
    ),
)
FORMS = (
    may(
        "response_format",
        either(TEXT_FORMAT.ref, OBJECT_FORMAT.ref, SCHEMA_FORMAT.ref),
        "the form of the answer's text; one form per request",
        "text",
    ),
    may("guided_json", SCHEMA, "a JSON schema for the whole answer"),
    may("guided_regex", text(1, MAX_SCHEMA_BYTES), "a pattern for the whole answer"),
    may("guided_choice", _CHOICES, "texts, of which one is the answer"),
    may("guided_grammar", text(1, MAX_SCHEMA_BYTES), "a context-free grammar for the whole answer"),
    may("structured_outputs", STRUCTURED_OUTPUTS.ref, "vLLM's newer name of the four above"),
)
METADATA: JsonObject = mapping(text(0, 512), most=MAX_LABELS, names={"maxLength": 64})
TREATMENT = (
    may("stream", flag(), "the answer as server-sent events", "false"),
    may("stream_options", STREAM_OPTIONS.ref, "for requests with stream: true"),
    _asked("priority", "lower is sooner", "0"),
    _asked("timeout_s", "seconds for the whole answer; 504 afterwards", "`router.limits`"),
    _asked(
        "first_token_timeout_s", "seconds to the first token; 504 afterwards", "`router.limits.first_token_timeout_s`"
    ),
    _asked("explain", "tell how the request was answered, as the answer's field `diptych`", "false"),
    _asked("user", "a label; checked and dropped"),
    _asked("safety_identifier", "a label; checked and dropped"),
    may("metadata", METADATA, "labels; checked and dropped"),
    _asked("prompt_cache_key", "requests of one key go to where their prefixes are"),
)
_WORDS = {
    "audio": "no model here speaks",
    "modalities": "answers are text",
    "moderation": "no model of this server moderates",
    "prediction": "predicted outputs are not offered",
    "prompt_cache_options": "prefixes are cached by themselves, and for no promised time",
    "prompt_cache_retention": "prefixes are cached for no promised time",
    "service_tier": "there is one tier; `priority` is finer",
    "skip_special_tokens": "special tokens are no text",
    "spaces_between_special_tokens": "special tokens are no text",
    "store": "chat answers are not kept; /v1/responses keeps them",
    "suffix": "models that fill in a middle are not served",
    "truncate_prompt_tokens": "a prompt that does not fit is refused",
    "use_beam_search": "answers are sampled",
    "verbosity": "no model here knows another",
    "web_search_options": "this server has no tools of its own",
}


def taken_at_default(names: frozenset[str]) -> tuple[Field, ...]:
    """The fields of protos/openai.py FIXED of these names, with what is told where they are refused."""
    found = []
    for name in sorted(names):
        words = _WORDS.get(name) or REASONS[name].partition(":")[2].strip()
        found.append(fixed(name, FIXED[name], words))
    return tuple(found)


MODEL = Field(name="model", schema=of_model(GenerationRequest, "model"), words="a name of /v1/models", is_required=True)
