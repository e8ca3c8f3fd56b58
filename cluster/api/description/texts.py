"""The operations that embed and rank texts."""

from __future__ import annotations

from diptych.cluster.config import LimitSettings
from diptych.protos.openai_embeddings import EmbeddingRequest
from diptych.protos.rerank import DEFAULT_TOKENS_PER_DOC, RerankRequest

from .answers import COUNT, answer
from .generation import ERRORS, HEADERS, REQUEST_ID
from .sampling import TOKEN
from .shapes import (
    Field,
    Operation,
    Reply,
    Shape,
    either,
    fixed,
    flag,
    many,
    may,
    need,
    nullable,
    number,
    of_model,
    one_of,
    tells,
    text,
    told,
)

_LIMITS = LimitSettings()
_INPUT = either(text(1), many(TOKEN, 1))


def _embedding(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(EmbeddingRequest, name)), words=words, default=default)


def _rerank(name: str, words: str, default: str = "") -> Field:
    return Field(name=name, schema=nullable(of_model(RerankRequest, name)), words=words, default=default)


_MODEL = need("model", of_model(EmbeddingRequest, "model"), "a name of /v1/models, of a model for texts")
EMBEDDING = Shape(
    name="EmbeddingRequest",
    words="Texts whose vectors are wanted.",
    fields=(
        _MODEL,
        need(
            "input",
            either(text(1), many(TOKEN, 1), many(_INPUT, 1)),
            "a text, token ids, or a list of either; "
            f"at most `router.limits.embedding_inputs` ({_LIMITS.embedding_inputs}) of them",
        ),
        _embedding("encoding_format", "numbers, or little-endian float32 in base64", "float"),
        _embedding("dimensions", "so many numbers of each vector, brought to length 1 again", "the model's"),
        _embedding("input_type", "what the texts are: query, document or a prompt's name; Cohere's field"),
        _embedding("task", "the same; Jina's field"),
        may(
            "truncate",
            either(flag(), text(pattern="^([nN][oO][nN][eE]|[sS][tT][aA][rR][tT]|[eE][nN][dD])$", example="end")),
            "which end of a text that is too long is cut off; true is `end`, false is `none`",
            "the model's, `none` unless configured",
        ),
        _embedding("timeout_s", "seconds; 504 afterwards", "`router.limits`"),
        _embedding("priority", "lower is sooner", "0"),
        _embedding("user", "a label; checked and dropped"),
    ),
)
TEXT_USAGE = answer("TextUsage", "Token counts.", told("prompt_tokens", COUNT), told("total_tokens", COUNT))
VECTOR = answer(
    "Embedding",
    "The vector of a text.",
    told("object", one_of("embedding")),
    told("index", COUNT, "of the text"),
    told("embedding", either(many(number(), 1), text(1)), "numbers, or base64"),
)
EMBEDDINGS = answer(
    "Embeddings",
    "The vectors, in the order of the texts.",
    told("object", one_of("list")),
    told("model", text(1)),
    told("data", many(VECTOR.ref, 1)),
    told("usage", TEXT_USAGE.ref),
)
DOCUMENT = Shape(name="RerankDocument", words="A document.", fields=(need("text", text(1), "its text"),))
RERANK = Shape(
    name="RerankRequest",
    words="Documents to be put in the order of what they have to do with a query.",
    fields=(
        _MODEL,
        need("query", of_model(RerankRequest, "query"), "what is looked for"),
        need(
            "documents",
            many(either(text(1), DOCUMENT.ref), 1),
            f"at most `router.limits.rerank_documents` ({_LIMITS.rerank_documents}) of them",
        ),
        _rerank("top_n", "only the best ones are told", "all"),
        _rerank("return_documents", "the answer repeats the documents", "false"),
        _rerank("max_tokens_per_doc", "what is longer loses its end", str(DEFAULT_TOKENS_PER_DOC)),
        fixed("rank_fields", [None, ["text"]], "a document has one field"),
        _rerank("timeout_s", "seconds; 504 afterwards", "`router.limits`"),
        _rerank("priority", "lower is sooner", "0"),
        _rerank("user", "a label; checked and dropped"),
    ),
)
RANKED_DOCUMENT = answer("RankedDocument", "A document of the request.", told("text", text(1)))
RESULT = answer(
    "RerankResult",
    "A document's place.",
    told("index", COUNT, "in the request"),
    told("relevance_score", number(), "higher is better"),
    tells("document", RANKED_DOCUMENT.ref),
)
META = answer(
    "RerankMeta",
    "Cohere's.",
    told("api_version", answer("", "", told("version", text(1))).schema()),
    told("billed_units", answer("", "", told("search_units", COUNT)).schema()),
    told("tokens", answer("", "", told("input_tokens", COUNT), told("output_tokens", COUNT)).schema()),
)
RANKING = answer(
    "Ranking",
    "The documents, the best first.",
    told("id", text(1)),
    told("object", one_of("list")),
    told("model", text(1)),
    told("results", many(RESULT.ref)),
    told("usage", TEXT_USAGE.ref, "Jina's"),
    told("meta", META.ref),
)
_TAG = "Texts"


def _rerank_operation(name: str, path: str, words: str) -> Operation:
    return Operation(
        id=name,
        method="POST",
        path=path,
        tag=_TAG,
        words=words,
        scope="inference",
        body=RERANK,
        headers=HEADERS,
        replies=(Reply(status=200, words="the order", media={"application/json": RANKING.ref}, headers=REQUEST_ID),),
        errors=ERRORS,
    )


OPERATIONS = (
    Operation(
        id="createEmbedding",
        method="POST",
        path="/v1/embeddings",
        tag=_TAG,
        words="texts to vectors; OpenAI's shape",
        scope="inference",
        body=EMBEDDING,
        headers=HEADERS,
        replies=(
            Reply(status=200, words="the vectors", media={"application/json": EMBEDDINGS.ref}, headers=REQUEST_ID),
        ),
        errors=ERRORS,
    ),
    _rerank_operation("rerank", "/v1/rerank", "documents by what they have to do with a query; Jina's path"),
    _rerank_operation("rerankV2", "/v2/rerank", "the same at Cohere's path"),
)
