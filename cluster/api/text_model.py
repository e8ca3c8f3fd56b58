"""A model that embeds or ranks texts, as the API knows it: its tokenizer, its prompts, what it refuses.

Tokenises in a thread of its own: the tokenizer's truncation is state, so that one thread alone may set it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import Tokenizer

from diptych.cluster.models import ModelFolder
from diptych.cluster.models.texts import TextFacts
from diptych.protos.embedding import TextRow
from diptych.protos.errors import ContextTooLong, InvalidRequest, StartupError
from diptych.protos.openai_embeddings import Truncation
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable

from .fair_thread import FairThread

if TYPE_CHECKING:
    from .served import ServedModel

QUERY, DOCUMENT = "query", "document"
# What clients of other servers call the two kinds of texts.
_KINDS = {
    QUERY: QUERY,
    "search_query": QUERY,
    "retrieval.query": QUERY,
    DOCUMENT: DOCUMENT,
    "passage": DOCUMENT,
    "search_document": DOCUMENT,
    "retrieval.passage": DOCUMENT,
}
_SIDES = {"end": "right", "start": "left"}
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """`truncate`: of texts that are too long, where a request does not say."""

    name: str
    facts: TextFacts
    tokenizer: Tokenizer
    vocab_size: int
    truncate: Truncation = "none"
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds
    _thread: FairThread = field(default_factory=lambda: FairThread("tokenise"))

    @classmethod
    def load(cls, name: str, folder: ModelFolder, facts: TextFacts, *, truncate: Truncation = "none") -> TextModel:
        """From a resolved model folder. Raises StartupError."""
        tokenizer = _tokenizer(folder.path)
        return cls(name=name, facts=facts, tokenizer=tokenizer, vocab_size=folder.facts.vocab_size, truncate=truncate)

    def close(self) -> None:
        """End the tokenising thread."""
        self._thread.close()

    @property
    def is_ranker(self) -> bool:
        """Whether its own head scores pairs, and it has no vectors."""
        return self.facts.task == "rerank"

    @property
    def endpoints(self) -> tuple[str, ...]:
        """As /v1/models tells them."""
        return ("rerank",) if self.is_ranker else ("embeddings", "rerank")

    def refusal(self, wanted: str) -> InvalidRequest:
        """For requests to an endpoint of models of another kind; `wanted` says what it would have to do."""
        own = " and ".join(f"POST /v1/{endpoint}" for endpoint in self.endpoints)
        return InvalidRequest(f"the model {printable(self.name)} does not {wanted}; it answers {own}", "model")

    def prompt(self, kind: tuple[str, str] | None) -> str:
        """What goes before texts that are what the field `kind` = (its name, its value) says. Raises InvalidRequest."""
        prompts = dict(self.facts.prompts)
        if kind is None:
            return prompts.get(self.facts.default_prompt, "")
        field, value = kind
        if value in prompts:
            return prompts[value]
        meant = _KINDS.get(value.lower())
        if meant is not None:  # a model without such a prompt reads queries and documents alike
            return prompts.get(meant, "") or (prompts.get("passage", "") if meant == DOCUMENT else "")
        known = ", ".join([QUERY, DOCUMENT, *(name for name in prompts if name not in (QUERY, DOCUMENT))])
        raise InvalidRequest(f"{field}: this model knows no {printable(value)!r}; it knows {known}", field)

    async def encode(
        self, texts: Sequence[str], *, prompt: str = "", truncate: Truncation | None = None
    ) -> list[TextRow]:
        """Token ids of each text, special ones included. Raises ContextTooLong for one that is too long unless it may
        be cut.
        """
        cut = truncate or self.truncate
        given = [prompt + text for text in texts]
        return await self._in_thread(lambda: self._encoded(given, cut))

    async def prompt_tokens(self, prompt: str) -> int:
        """Tokens at the front of a text that are a prompt's, where these take no part in pooling."""
        if not prompt or self.facts.pools_prompt:
            return 0
        return await self._in_thread(lambda: self._prompt_tokens(prompt))

    async def encode_pairs(self, query: str, documents: Sequence[str], *, tokens_per_doc: int) -> list[TextRow]:
        """The query with each document, which loses its end where the pair would be too long. Raises ContextTooLong
        for a query that leaves no room.
        """
        return await self._in_thread(lambda: self._pairs(query, documents, tokens_per_doc))

    async def shortened(self, documents: Sequence[str], *, tokens_per_doc: int) -> list[str]:
        """The documents, cut where their text has more tokens than that."""
        return await self._in_thread(lambda: self._short(documents, tokens_per_doc))

    async def tokens(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """Of a text of any length, without a prompt before it."""
        return await self._in_thread(lambda: self._tokens(text, add_special))

    async def text(self, tokens: Sequence[int]) -> str:
        """What tokens stand for, special ones written out."""
        batch = [list(tokens)]
        texts = await self._in_thread(lambda: self.tokenizer.decode_batch(batch, skip_special_tokens=False))
        return str(texts[0])

    # ---- in the thread ----

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await self._thread.run(work)

    def _encoded(self, texts: Sequence[str], cut: Truncation) -> list[TextRow]:
        longest = self.facts.max_tokens
        if cut == "none":
            self.tokenizer.no_truncation()
        else:
            self.tokenizer.enable_truncation(longest, direction=_SIDES[cut])
        encodings = self.tokenizer.encode_batch_fast([self._cased(text) for text in texts])
        rows = [TextRow(encoding.ids) for encoding in encodings]
        for number, row in enumerate(rows):
            if len(row.ids) > longest:
                raise ContextTooLong(
                    f"input[{number}] has {len(row.ids)} tokens, and this model reads {longest}; shorten it, or send "
                    '"truncate": "end" (or "start") to have it cut there',
                    "input",
                )
            if not row.ids:
                raise InvalidRequest(f"input[{number}] has no token: this model's tokenizer makes none of it", "input")
        return rows

    def _tokens(self, text: str, add_special: bool) -> tuple[int, ...]:
        self.tokenizer.no_truncation()
        (encoding,) = self.tokenizer.encode_batch_fast([self._cased(text)], add_special_tokens=add_special)
        return tuple(encoding.ids)

    def _prompt_tokens(self, prompt: str) -> int:
        self.tokenizer.no_truncation()
        text = self._cased(prompt)
        alone, bare = (self.tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False))
        front = next((at for at in range(len(alone)) if alone[at : at + len(bare)] == bare), 0)
        return front + len(bare)

    def _pairs(self, query: str, documents: Sequence[str], tokens_per_doc: int) -> list[TextRow]:
        longest = self.facts.max_tokens
        asked = self._cased(query)
        self.tokenizer.no_truncation()
        alone = len(self.tokenizer.encode(asked, "").ids)
        if alone >= longest:
            raise ContextTooLong(
                f"query has {alone} tokens with the model's own; a pair has room for {longest}, so that nothing of a "
                "document would be read",
                "query",
            )
        cut = [self._cased(text) for text in self._short(documents, tokens_per_doc)]
        self.tokenizer.enable_truncation(longest, strategy="longest_first")
        encodings = self.tokenizer.encode_batch([(asked, text) for text in cut])
        tells = self.facts.tells_pairs
        return [TextRow(encoding.ids, _second(encoding.type_ids) if tells else 0) for encoding in encodings]

    def _short(self, documents: Sequence[str], tokens_per_doc: int) -> list[str]:
        # No token is made of less than nothing: most documents need no counting.
        long = [at for at, text in enumerate(documents) if len(text.encode()) > tokens_per_doc]
        found = list(documents)
        self.tokenizer.no_truncation()
        encodings = self.tokenizer.encode_batch([documents[at] for at in long], add_special_tokens=False)
        for at, encoding in zip(long, encodings, strict=True):
            if len(encoding.ids) > tokens_per_doc:
                found[at] = documents[at][: encoding.offsets[tokens_per_doc - 1][1]]
        return found

    def _cased(self, text: str) -> str:
        return text.lower() if self.facts.lower_case else text


class Generators(dict[str, "ServedModel"]):
    """The served models that generate, by name. To `get` one of the `others` raises InvalidRequest: its client should
    learn which endpoint it has, not that there is no such model.
    """

    def __init__(self, models: Iterable[ServedModel], others: Mapping[str, TextModel]) -> None:
        super().__init__((model.name, model) for model in models)
        self._others = others

    def get(self, name: str, default: Any = None) -> Any:
        """As of any dict, but for the others."""
        if name in self._others:
            raise self._others[name].refusal("generate text")
        return super().get(name, default)


def _second(types: Sequence[int]) -> int:
    """Where the second text of a pair begins; 0 for models that do not tell the two apart."""
    return types.index(1) if 1 in types else 0


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the library raises bare Exception
        raise StartupError(f"{folder / 'tokenizer.json'} cannot be read: {exc}") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def text_capabilities(model: TextModel, limits: Mapping[str, int]) -> JsonObject:
    """What a model makes of texts, as /v1/models tells it."""
    facts = model.facts
    told: JsonObject = {
        "task": facts.task,
        "endpoints": list(model.endpoints),
        "modalities": {"input": ["text"], "output": ["scores"] if model.is_ranker else ["vectors", "scores"]},
        "max_tokens": facts.max_tokens,
        "truncate": model.truncate,
        "ranks_by": "its own head" if model.is_ranker else "cosine",
        "limits": dict(limits),
    }
    if model.is_ranker:
        return told | {"scores": {"sigmoid": "0 to 1", "identity": "any number"}[facts.activation]}
    prompts: list[Any] = [name for name, _ in facts.prompts]
    return told | {
        "dimensions": {"default": facts.dimensions, "min": 1, "max": facts.dimensions},
        "pooling": facts.pooling,
        "normalized": facts.normalize,
        "prompts": prompts,
        "default_prompt": facts.default_prompt or None,
        "encoding_formats": ["float", "base64"],
    }
