"""The small pages: models, requests' lives, tokens, health, and this description itself."""

from __future__ import annotations

from typing import get_args

from diptych.cluster.api.lives import LISTED, MAX_LISTED
from diptych.cluster.api.model_pages import _LIFECYCLES as LIFECYCLES
from diptych.cluster.api.model_pages import LISTED as THEIR_LISTED
from diptych.cluster.api.model_pages import MAX_LISTED as THEIR_MOST
from diptych.cluster.router.life import State
from diptych.protos import tokenize as tokens
from diptych.protos.openai_output import Kind

from . import anthropic
from .answers import COUNT, DETOKENIZED, ERROR_BODY, TOKENS, answer
from .chat import MESSAGES, TEMPLATE, TOOLS
from .shapes import (
    Field,
    Operation,
    Reply,
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
    one_of,
    tells,
    text,
    told,
    whole,
)

MODEL_LIMITS = answer(
    "ModelLimits", "Of one request.", told("n", whole(1)), told("answers", whole(1), "over all prompts of a request")
)
MODEL_TOOLS = answer(
    "ModelTools",
    "How the model calls functions.",
    told("format", text(1), "in which it writes calls"),
    told("in_template", flag(), "false: a system message tells it of tools"),
    told("choices", many(text(1))),
    told("parallel", flag()),
    told("guided", flag(), "names exist and arguments fit, whatever `strict` says"),
    told("max", whole(1)),
)
MODEL_REASONING = answer(
    "ModelReasoning",
    "How it reasons.",
    told("format", text(1)),
    told("field", text(1), "of the answer's message"),
    told("before_constraints", flag(), "it may reason before an answer that has a form"),
)
CAPABILITIES = answer(
    "ModelCapabilities",
    "What the model can do, so that no client needs a list of models' names.",
    told("context_tokens", whole(0), "prompt and answer together"),
    told("modalities", mapping(many(text(1)))),
    told("endpoints", many(text(1))),
    tells("constraints", many(one_of(*get_args(Kind))), "forms that answers can be held to"),
    tells("schema", any_object(), "the dialects of JSON schema, and how large one may be"),
    tells("tools", nullable(MODEL_TOOLS.ref)),
    tells("reasoning", nullable(MODEL_REASONING.ref)),
    tells("logprobs", any_object()),
    tells("limits", MODEL_LIMITS.ref),
)
MODEL_CARD = answer(
    "Model",
    "A served model.",
    told("id", text(1), "its name in requests"),
    told("object", one_of("model")),
    told("created", COUNT, "Unix seconds"),
    told("owned_by", text(1)),
    told("max_model_len", whole(0), "tokens that prompt and answer may have together"),
    told("sampling_defaults", mapping(number()), "for sampling fields that a request does not give"),
    told("capabilities", CAPABILITIES.ref),
)
MODEL_LIST = answer("ModelList", "What is served.", told("object", one_of("list")), told("data", many(MODEL_CARD.ref)))

_SECONDS = number(0)
PLACEMENT = answer(
    "Placement",
    "One try at a choice.",
    told("prefill_engine", nullable(text(1)), "null: the decode engine computed the prompt"),
    told("decode_engine", text(1), "of a route: its target"),
    told("path", one_of("pd", "local", "route")),
    told("at_s", _SECONDS, "after the request's head was read"),
    told("ended_by", nullable(text(1)), "the code of the error that ended it, if one did"),
)
_STATE = one_of(*(state.value for state in State))
LIFE = answer(
    "ChoiceLife",
    "One choice of a request.",
    told("state", _STATE),
    told("prompt_tokens", COUNT),
    told("tokens", COUNT, "so far"),
    told("seconds", mapping(_SECONDS, names={"enum": [state.value for state in State]}), "in each state"),
    told("attempts", COUNT),
    told("placements", many(PLACEMENT.ref), "the last ones"),
    told("error_code", nullable(text(1))),
)
LIFE_ERROR = answer("RequestError", "Why a request failed.", told("code", text(1)), told("message", text()))
REQUEST = answer(
    "Request",
    "The life of a request so far.",
    told("id", text(1), "of the answer, and its x-request-id"),
    told("object", one_of("request")),
    told("created", COUNT, "Unix seconds"),
    told("endpoint", text(1)),
    told("model", nullable(text(1))),
    told("state", _STATE),
    told("is_over", flag()),
    told("is_cancelled", flag()),
    told("error", nullable(LIFE_ERROR.ref)),
    told("total_s", _SECONDS),
    told("num_tokens", COUNT),
    told("router", text(1), "which replica answered; only it knows"),
    told("choices", many(LIFE.ref)),
)
REQUEST_LIST = answer(
    "RequestList",
    "The last requests, the newest first.",
    told("object", one_of("list")),
    told("data", many(REQUEST.ref)),
)
HEALTH = answer("Health", "The process lives.", told("status", one_of("ok")))
READY = answer(
    "Ready",
    "Whether every model has engines to answer with.",
    told("ready", flag()),
    told("models", mapping(mapping(COUNT)), "engines by model and role"),
)

_MODEL = may("model", text(1, tokens.MAX_MODEL_CHARS), "a name of /v1/models", "the one that is served, if it is one")
_FIXED = tuple(fixed(name, values, words) for name, (values, words) in tokens.FIXED.items())
TOKENIZE_TEXT = Shape(
    name="TokenizeText",
    words="A text whose tokens are wanted.",
    fields=(
        need("prompt", text(0, tokens.MAX_TEXT_CHARS), "the text"),
        _MODEL,
        may("add_special_tokens", flag(), "with what the tokenizer puts around a text", "true"),
        may("return_token_strs", flag(), "with the vocabulary's own names of the tokens", "false"),
        fixed("messages", [None], "is for conversations: send it instead of `prompt`"),
        *_FIXED,
    ),
)
TOKENIZE_CHAT = Shape(
    name="TokenizeChat",
    words="A conversation whose tokens are wanted, as /v1/chat/completions would compute them.",
    fields=(
        MESSAGES,
        _MODEL,
        next(one for one in TOOLS if one.name == "tools"),
        *(one for one in TEMPLATE if one.name in tokens.TEMPLATE_FIELDS),
        may("add_special_tokens", flag(), "also with what the tokenizer puts around a text", "false"),
        may("return_token_strs", flag(), "with the vocabulary's own names of the tokens", "false"),
        fixed("prompt", [None], "is for texts: send it instead of `messages`"),
        *_FIXED,
    ),
)
TOKENIZE = Shape(name="TokenizeRequest", words="A text or a conversation.", one_of=(TOKENIZE_TEXT, TOKENIZE_CHAT))
DETOKENIZE = Shape(
    name="DetokenizeRequest",
    words="Tokens whose text is wanted.",
    fields=(
        need("tokens", many(whole(0), 0, tokens.MAX_TOKEN_IDS), "ids of the model's vocabulary"),
        _MODEL,
    ),
)

_JSON = "application/json"


def ok(shape: Shape, words: str) -> Reply:
    """200 with this shape."""
    return Reply(status=200, words=words, media={_JSON: shape.ref})


def in_path(name: str, words: str) -> Field:
    """A part of the path: any text of one segment."""
    return need(name, text(1), words)


_TAG_MODELS, _TAG_REQUESTS, _TAG_TOKENS, _TAG_SERVER = "Models", "Requests", "Tokens", "Server"
_REQUEST_ID = in_path("id", "of the answer, as in its x-request-id")


def _tokens_operation(path: str, name: str, words: str, *, is_text: bool) -> Operation:
    return Operation(
        id=name,
        method="POST",
        path=path,
        tag=_TAG_TOKENS,
        words=words,
        scope="inference",
        body=DETOKENIZE if is_text else TOKENIZE,
        replies=(ok(DETOKENIZED if is_text else TOKENS, words),),
        errors=frozenset({400, 404, 408, 413}),
    )


_TOKENIZE, _DETOKENIZE = "the tokens of a text or of a conversation", "the text of tokens"
_THEIRS = "with anthropic-version: "
_THEIR_QUERY = (
    Field(name="limit", schema=whole(1, THEIR_MOST), words=f"{_THEIRS}models of a page", default=str(THEIR_LISTED)),
    Field(name="after_id", schema=text(), words=f"{_THEIRS}the model that the page begins after"),
    Field(name="before_id", schema=text(), words=f"{_THEIRS}the model that the page ends before"),
    Field(name="lifecycle", schema=one_of(*LIFECYCLES), words=f"{_THEIRS}every model here is active"),
    Field(name="beta", schema=text(), words=f"{_THEIRS}changes nothing"),
)


_EITHER_ERROR = either(ERROR_BODY.ref, anthropic.ERROR_BODY.ref)


def _either(ours: Shape, theirs: Shape, words: str) -> Reply:
    return Reply(status=200, words=words, media={_JSON: either(ours.ref, theirs.ref)})


OPERATIONS = (
    _tokens_operation("/v1/tokenize", "tokenize", _TOKENIZE, is_text=False),
    _tokens_operation("/v1/detokenize", "detokenize", _DETOKENIZE, is_text=True),
    _tokens_operation("/tokenize", "tokenizeAtRoot", f"{_TOKENIZE}, at vLLM's path", is_text=False),
    _tokens_operation("/detokenize", "detokenizeAtRoot", f"{_DETOKENIZE}, at vLLM's path", is_text=True),
    Operation(
        id="listRequests",
        method="GET",
        path="/v1/requests",
        tag=_TAG_REQUESTS,
        words="the tenant's last requests at this replica, the newest first",
        scope="any key",
        query=(
            Field(name="limit", schema=whole(1, MAX_LISTED), words="how many", default=str(LISTED)),
            Field(name="state", schema=_STATE, words="only those in this state"),
        ),
        replies=(ok(REQUEST_LIST, "the requests"),),
        errors=frozenset({400}),
    ),
    Operation(
        id="getRequest",
        method="GET",
        path="/v1/requests/{id}",
        tag=_TAG_REQUESTS,
        words="the life of one request so far",
        scope="any key",
        path_fields=(_REQUEST_ID,),
        replies=(ok(REQUEST, "the request"),),
        errors=frozenset({400, 404}),
    ),
    Operation(
        id="cancelRequest",
        method="POST",
        path="/v1/requests/{id}/cancel",
        tag=_TAG_REQUESTS,
        words="end a request in any state; one that is over is told as it is",
        scope="any key",
        path_fields=(_REQUEST_ID,),
        replies=(ok(REQUEST, "the request"),),
        errors=frozenset({400, 404}),
    ),
    Operation(
        id="listModels",
        method="GET",
        path="/v1/models",
        tag=_TAG_MODELS,
        words="what is served, and what it can do",
        scope="any key",
        headers=(anthropic.ANY_VERSION,),
        error_schema=_EITHER_ERROR,
        query=_THEIR_QUERY,
        replies=(_either(MODEL_LIST, anthropic.MODELS, "the models; in Anthropic's shape for its clients"),),
        errors=frozenset({400}),
    ),
    Operation(
        id="getModel",
        method="GET",
        path="/v1/models/{name}",
        tag=_TAG_MODELS,
        words="one model; slashes in its name may stand as they are",
        scope="any key",
        path_fields=(in_path("name", "of the model"),),
        headers=(anthropic.ANY_VERSION,),
        error_schema=_EITHER_ERROR,
        replies=(_either(MODEL_CARD, anthropic.MODEL, "the model; likewise"),),
        errors=frozenset({404}),
    ),
    Operation(
        id="health",
        method="GET",
        path="/health",
        tag=_TAG_SERVER,
        words="whether the process lives",
        scope="",
        replies=(ok(HEALTH, "it does"),),
    ),
    Operation(
        id="ready",
        method="GET",
        path="/ready",
        tag=_TAG_SERVER,
        words="whether every model can be answered with",
        scope="",
        replies=(ok(READY, "yes"), Reply(status=503, words="not now", media={_JSON: READY.ref})),
    ),
    Operation(
        id="metrics",
        method="GET",
        path="/metrics",
        tag=_TAG_SERVER,
        words="Prometheus' text format; docs/concepts/metrics.md names the series",
        scope="admin",
        replies=(Reply(status=200, words="the metrics", media={"text/plain; version=0.0.4; charset=utf-8": text()}),),
    ),
    Operation(
        id="info",
        method="GET",
        path="/info",
        tag=_TAG_SERVER,
        words="the cluster as this replica sees it: engines, losses, the last requests, versions",
        scope="admin",
        replies=(Reply(status=200, words="the cluster", media={_JSON: any_object()}),),
    ),
    Operation(
        id="describe",
        method="GET",
        path="/openapi.json",
        tag=_TAG_SERVER,
        words="this document",
        scope="any key",
        replies=(Reply(status=200, words="OpenAPI 3.1", media={_JSON: any_object()}),),
    ),
)
