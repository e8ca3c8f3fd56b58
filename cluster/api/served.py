"""A model as the API knows it: its name, how to write its prompts, the numbers that requests are checked against."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from diptych.cluster.formats.detect import detect, named
from diptych.cluster.formats.format import Format
from diptych.cluster.models import NO_DEFAULTS, ModelFolder, SamplingDefaults

from .render import Renderer
from .text import TokenTable

NO_FORMAT = Format()
AUTO, NONE = "auto", "none"  # formats: as the template and the tokens tell; not read at all

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`max_context_tokens` is the model's; the engines' pools may allow less. `seed` None: a fresh one per request."""

    name: str
    renderer: Renderer
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: frozenset[int]
    seed: int | None = None
    defaults: SamplingDefaults = NO_DEFAULTS
    format: Format = NO_FORMAT  # in which it writes reasoning and calls
    markers: Mapping[str, int] = field(default_factory=dict)  # those of the format that are one token, and this token
    marked_table: TokenTable = field(init=False)  # which shows them, special or not
    weights: str = ""  # the same as another model's that gives the same answers; empty where nobody knows
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds
    fingerprint: str = field(init=False)  # OpenAI's system_fingerprint: the same at every router that serves the same

    def __post_init__(self) -> None:
        told = (importlib.metadata.version("diptych"), self.name, self.vocab_size, self.max_context_tokens, self.format)
        digest = hashlib.sha256(repr((*told, sorted(self.eos_token_ids))).encode()).hexdigest()
        object.__setattr__(self, "fingerprint", f"fp_{digest[:12]}")
        table = self.renderer.table.showing(self.markers.values())
        object.__setattr__(self, "marked_table", table)

    @classmethod
    def load(
        cls,
        name: str,
        folder: ModelFolder,
        *,
        max_context_tokens: int | None = None,
        seed: int | None = None,
        tool_format: str = AUTO,
        reasoning_format: str = AUTO,
        weights: str = "",
    ) -> ServedModel:
        """From a resolved model folder; formats by name, `none`, or `auto`. Raises StartupError."""
        facts = folder.facts
        if facts.defaults.ignored:
            keys = ", ".join(facts.defaults.ignored)
            log.info("%s: these keys of its generation_config.json have no effect here: %s", name, keys)
        renderer = Renderer.load(folder.path, facts.chat_template)
        vocabulary = renderer.tokenizer.get_vocab()
        format = _format(facts.chat_template, vocabulary, tool_format, reasoning_format)
        return cls(
            name=name,
            renderer=renderer,
            vocab_size=facts.vocab_size,
            max_context_tokens=min(max_context_tokens or facts.max_context_tokens, facts.max_context_tokens),
            eos_token_ids=frozenset(facts.eos_token_ids),
            seed=seed,
            defaults=facts.defaults,
            format=format,
            weights=weights,
            markers={text: vocabulary[text] for text in format.markers if text in vocabulary},
        )


def _format(template: str | None, vocabulary: Mapping[str, int], tools: str, reasoning: str) -> Format:
    found = detect(template, vocabulary)
    wanted = named(None if tools in (AUTO, NONE) else tools, None if reasoning in (AUTO, NONE) else reasoning)
    return Format(
        found.tools if tools == AUTO else wanted.tools, found.reasoning if reasoning == AUTO else wanted.reasoning
    )
