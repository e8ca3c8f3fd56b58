"""Every limit of the API in one table, from the constants that enforce them: docs/limits.md, written by `make docs`.

A test sends one more than each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from diptych.cluster.api import batches as batch_pages
from diptych.cluster.api import files as file_pages
from diptych.cluster.api import listener, lives, multipart, responses_pages
from diptych.cluster.api.idempotency import KEPT_S, MAX_KEY_CHARS
from diptych.cluster.api.model_pages import MAX_LISTED as MODELS_LISTED
from diptych.cluster.batches.settings import BatchSettings, FileSettings
from diptych.cluster.config import MAX_LABEL_CHARS, LimitSettings, ResponsesSettings, TenantSettings
from diptych.protos import (
    anthropic_tools,
    openai,
    openai_batches,
    openai_files,
    openai_messages,
    openai_output,
    openai_parts,
    openai_sampling,
    openai_template,
    openai_tools,
    responses_items,
    strict_json,
    tokenize,
)


@dataclass(frozen=True, slots=True)
class Limit:
    """`where` names the field or the setting; `answer` is what one more gets."""

    what: str
    most: str
    where: str
    answer: str = "400"


@dataclass(frozen=True, slots=True)
class Group:
    """Limits that belong together."""

    title: str
    words: str
    limits: tuple[Limit, ...]


def _bytes(value: int) -> str:
    for exponent, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << exponent and value % (1 << exponent) == 0:
            return f"{value >> exponent} {name}"
    return f"{value:,} bytes"


def _fixed(what: str, most: int, where: str, answer: str = "400") -> Limit:
    return Limit(what, f"{most:,}", where, answer)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    if name.endswith("bytes"):
        return _bytes(int(value))
    return f"{value:,g} s" if name.endswith("_s") else f"{value:,}"


def _settings(branch: str, model: BaseModel, answers: dict[str, str]) -> Iterator[Limit]:
    for name, answer in answers.items():
        info, value = type(model).model_fields[name], getattr(model, name)
        yield Limit((info.description or "").partition(";")[0], _shown(name, value), f"`{branch}.{name}`", answer)


_sampling, _messages = openai_sampling, openai_messages
GROUPS: tuple[Group, ...] = (
    Group(
        "Of connections and bodies",
        "Settings: their defaults stand here. Enforced by the listener and before a body is parsed.",
        (
            *_settings(
                "router.limits",
                LimitSettings(),
                {
                    "header_bytes": "431",
                    "header_timeout_s": "408",
                    "body_bytes": "413, before the body is read",
                    "body_timeout_s": "408",
                    "idle_timeout_s": "the connection is closed",
                    "write_timeout_s": "the connection is closed, its requests are cancelled",
                    "max_connections": "503",
                    "max_running": "the request waits",
                    "max_waiting": "503 with retry-after",
                    "request_timeout_s": "504",
                    "first_token_timeout_s": "504",
                    "idempotency_bytes": "422 to who asks again",
                },
            ),
            _fixed("headers of a request", listener.MAX_HEADERS, "headers", "431"),
            Limit("bytes of a chunked body's frames", _bytes(listener.FRAMING_BYTES), "headers"),
        ),
    ),
    Group(
        "Of JSON",
        "Of every body, and of every JSON text inside one.",
        (
            _fixed("levels of objects and lists in one another", strict_json.MAX_DEPTH, "body"),
            _fixed("objects and lists", strict_json.MAX_CONTAINERS, "body"),
            _fixed("members of all objects", strict_json.MAX_MEMBERS, "body"),
            Limit("digits of a whole number", "4,300", "body"),
            Limit("members of the same name", "1", "body"),
        ),
    ),
    Group(
        "Of a request to generate",
        "Of every wire format that has the field, under whichever name.",
        (
            _fixed("answers to a prompt", _sampling.MAX_CHOICES, "`n`"),
            _fixed("answers to all prompts of a request", openai.MAX_ANSWERS, "`prompt`, `n`"),
            _fixed("tokens of an answer", 2**31 - 1, "`max_tokens`, and the model's context"),
            _fixed("alternatives told with a token", _sampling.MAX_LOGPROBS, "`logprobs`, `top_logprobs` and others"),
            _fixed("texts that end an answer", _sampling.MAX_STOPS, "`stop`, `stop_sequences`"),
            _fixed("characters of one", _sampling.MAX_STOP_CHARS, "`stop`, `stop_sequences`"),
            _fixed("tokens that end an answer", _sampling.MAX_STOP_TOKENS, "`stop_token_ids`"),
            _fixed("texts that it may not have", _sampling.MAX_BAD_WORDS, "`bad_words`"),
            _fixed("tokens with a bias", _sampling.MAX_BIASED, "`logit_bias`"),
            _fixed("tokens that it may have alone", _sampling.MAX_ALLOWED_TOKENS, "`allowed_token_ids`"),
            _fixed("messages, items of a conversation", _messages.MAX_MESSAGES, "`messages`, `input`"),
            _fixed("parts of a content", openai_parts.MAX_PARTS, "`content`"),
            _fixed("calls of a message", _messages.MAX_CALLS, "`tool_calls`"),
            _fixed("characters of an id", _messages.MAX_ID_CHARS, "ids and names in messages"),
            _fixed("characters of an address", openai_parts.MAX_URL_CHARS, "`url`"),
            _fixed("characters of a file's name", openai_parts.MAX_NAME_CHARS, "`filename`"),
            _fixed("items of a stored conversation", responses_items.MAX_ITEMS, "`previous_response_id`"),
            _fixed("tools", openai_tools.MAX_TOOLS, "`tools`, `functions`"),
            Limit("all their schemas together", _bytes(openai_tools.MAX_SCHEMA_BYTES), "`parameters`"),
            _fixed("characters of all descriptions", openai_tools.MAX_DESCRIPTION_CHARS, "`description`"),
            _fixed("examples of a tool's input", anthropic_tools.MAX_EXAMPLES, "`input_examples`"),
            Limit(
                "a schema, pattern or grammar",
                _bytes(openai_tools.MAX_SCHEMA_BYTES),
                "`response_format` and others",
            ),
            _fixed("texts to choose among", openai_output.MAX_CHOICE_ENTRIES, "`guided_choice`"),
            _fixed("template variables", openai_template.MAX_VARIABLES, "`chat_template_kwargs`"),
            _fixed("characters of one", openai_template.MAX_VALUE_CHARS, "`chat_template_kwargs`"),
            _fixed("labels, of 64 and 512 characters", openai.MAX_LABELS, "`metadata`"),
            _fixed("characters of a tenant's or session's name", MAX_LABEL_CHARS, "`x-tenant`, `x-session-id`"),
            _fixed("characters of a key of idempotency", MAX_KEY_CHARS, "`Idempotency-Key`"),
            Limit("hours that an answer is kept for it", f"{KEPT_S // 3600}", "`Idempotency-Key`", "worked on anew"),
            Limit("seconds that a request may ask for", "86,400", "`timeout_s`, `first_token_timeout_s`"),
        ),
    ),
    Group(
        "Of tokens, embeddings and rerank",
        "Settings with their defaults, and bounds of the tokenizer's pages.",
        (
            _fixed("characters to tokenise", tokenize.MAX_TEXT_CHARS, "`prompt` of /v1/tokenize"),
            _fixed("tokens to turn into text", tokenize.MAX_TOKEN_IDS, "`tokens` of /v1/detokenize"),
            *_settings(
                "router.limits",
                LimitSettings(),
                {"embedding_inputs": "400", "rerank_documents": "400", "embedding_tokens": "400"},
            ),
        ),
    ),
    Group(
        "Of files and batches",
        "Settings with their defaults, and bounds of the wire format.",
        (
            *_settings(
                "router.files",
                FileSettings(),
                {
                    "max_bytes": "413",
                    "tenant_bytes": "403",
                    "tenant_files": "403",
                    "keep_free_bytes": "507",
                    "max_uploads": "503 with retry-after",
                    "upload_timeout_s": "408",
                },
            ),
            Limit("a form beside its file", _bytes(multipart.FORM_BYTES), "POST /v1/files", "413"),
            _fixed("parts of a form", multipart.MAX_FIELDS, "POST /v1/files"),
            _fixed("bytes of a field of a form", multipart.FIELD_BYTES, "POST /v1/files"),
            _fixed("characters of a file's name", openai_files.MAX_NAME_CHARS, "POST /v1/files"),
            *_settings(
                "router.batches",
                BatchSettings(),
                {
                    "input_bytes": "400",
                    "max_lines": "the batch fails",
                    "line_bytes": "the batch fails",
                    "tenant_batches": "429",
                },
            ),
            _fixed("characters of a line's custom_id", openai_batches.MAX_CUSTOM_ID_CHARS, "a line", "the batch fails"),
            _fixed("days of a completion window", openai_batches.MOST_WINDOW_S // 86_400, "`completion_window`"),
        ),
    ),
    Group(
        "Of responses and lists",
        "",
        (
            *_settings("router.responses", ResponsesSettings(), {"tenant_bytes": "403", "max_background": "429"}),
            _fixed("requests of a page", lives.MAX_LISTED, "GET /v1/requests"),
            _fixed("models of a page", MODELS_LISTED, "GET /v1/models, Anthropic's clients"),
            _fixed("items of a page", responses_pages.MAX_LISTED, "GET /v1/responses/{id}/input_items"),
            _fixed("files of a page", file_pages.LISTED, "GET /v1/files"),
            _fixed("batches of a page", batch_pages.MOST_LISTED, "GET /v1/batches"),
        ),
    ),
    Group(
        "Of a tenant or a key",
        "None unless configured, or given to `diptych keys create`.",
        tuple(
            _settings(
                "router.tenants.NAME",
                TenantSettings(),
                {"requests_per_minute": "429", "concurrency": "429", "most_urgent": "400"},
            )
        ),
    ),
)


_HEAD = """# Limits

Made by `make docs` from the constants that enforce them; do not edit. What is over one of them is refused before work
is done, by an error that names the field and the limit. Settings stand in [configuration.md](configuration.md).
"""


def page() -> str:
    """docs/limits.md."""
    parts = [_HEAD]
    for group in GROUPS:
        parts.append(f"## {group.title}\n")
        if group.words:
            parts.append(group.words + "\n")
        parts.append("| at most | of what | where | one more gets |\n|---|---|---|---|")
        parts += [f"| {one.most} | {one.what} | {one.where} | {one.answer} |" for one in group.limits]
        parts.append("")
    return "\n".join(parts)
