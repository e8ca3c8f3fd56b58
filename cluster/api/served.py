"""A model as the API knows it: its name, how to write its prompts, the numbers that requests are checked against."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from diptych.cluster.models import NO_DEFAULTS, ModelFolder, SamplingDefaults

from .render import Renderer

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
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    @classmethod
    def load(
        cls, name: str, folder: ModelFolder, *, max_context_tokens: int | None = None, seed: int | None = None
    ) -> ServedModel:
        """From a resolved model folder. Raises StartupError."""
        facts = folder.facts
        if facts.defaults.ignored:
            keys = ", ".join(facts.defaults.ignored)
            log.info("%s: these keys of its generation_config.json have no effect here: %s", name, keys)
        return cls(
            name=name,
            renderer=Renderer.load(folder.path, facts.chat_template),
            vocab_size=facts.vocab_size,
            max_context_tokens=min(max_context_tokens or facts.max_context_tokens, facts.max_context_tokens),
            eos_token_ids=frozenset(facts.eos_token_ids),
            seed=seed,
            defaults=facts.defaults,
        )
