"""What each configured model is for, once its folder is known: to generate, to embed texts, or to rank pairs.

Called before a plan is made and by the router's plan. The folder's own word is models/texts.py's; the configuration's
wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diptych.protos.errors import StartupError

from .config import DiptychConfig, ModelSettings
from .models import ModelFolder
from .models.texts import TextFacts, read_text_facts

_RANKER = "ForSequenceClassification"
# Keys of a model that generates.
_OF_GENERATION = (
    "decode",
    "deterministic",
    "kv",
    "layout",
    "max_context_tokens",
    "prefill",
    "reasoning_format",
    "seed",
    "tool_format",
)


def settle_tasks(config: DiptychConfig, folders: Mapping[str, ModelFolder]) -> DiptychConfig:
    """The configuration without `task: auto`. Raises StartupError for a task that a model cannot have."""
    models = {name: _settled(name, settings, folders[name]) for name, settings in config.models.items()}
    return config.model_copy(update={"models": models})


def _settled(name: str, settings: ModelSettings, folder: ModelFolder) -> ModelSettings:
    found, wanted = folder.facts.task, settings.task
    if wanted == "auto":
        settings = settings.model_copy(update={"task": found})
    architecture, is_ranker = folder.facts.architecture, folder.facts.architecture.endswith(_RANKER)
    is_generator = found == "generate" or architecture.endswith("ForCausalLM")
    if wanted == "generate" and not is_generator:
        raise StartupError(f"models.{name}.task is generate, and {architecture} generates nothing; leave the key out")
    if wanted == "rerank" and not is_ranker:
        raise StartupError(
            f"models.{name}.task is rerank, and {architecture} has no head that scores pairs; with task: embed "
            "documents are ranked by the cosine of their vectors"
        )
    _refuse_idle_keys(name, settings)
    return settings


def _refuse_idle_keys(name: str, settings: ModelSettings) -> None:
    """StartupError for keys that mean nothing to the task and are not as they are by themselves."""
    is_of_texts, usual = settings.task != "generate", ModelSettings()
    keys = _OF_GENERATION if is_of_texts else ("embed",)
    idle = [key for key in keys if getattr(settings, key) != getattr(usual, key)]
    if idle:
        does = "embeds or ranks texts: its engines hold no KV and write no text" if is_of_texts else "generates text"
        verb = "do" if len(idle) > 1 else "does"
        raise StartupError(f"models.{name}: {', '.join(idle)} {verb} nothing for a model that {does}; leave it out")


def text_facts(name: str, settings: ModelSettings, folder: ModelFolder) -> TextFacts | None:
    """What the model makes of texts, as the folder and the configuration say; None for one that generates. The task is
    settled. Raises StartupError.
    """
    if settings.task not in ("embed", "rerank"):
        return None
    facts, wishes = read_text_facts(folder.path, settings.task), settings.embed
    if wishes.max_tokens is not None and wishes.max_tokens > facts.max_tokens:
        raise StartupError(
            f"models.{name}.embed.max_tokens is {wishes.max_tokens}, and this model reads texts of {facts.max_tokens} "
            "tokens; lower it, or leave it out"
        )
    if settings.task == "rerank" and (wishes.pooling != "auto" or wishes.normalize is not None):
        raise StartupError(
            f"models.{name}.embed: pooling and normalize are for vectors, and this model's own head scores pairs; "
            "remove them"
        )
    return replace(
        facts,
        pooling=facts.pooling if wishes.pooling == "auto" else wishes.pooling,
        normalize=facts.normalize if wishes.normalize is None else wishes.normalize,
        max_tokens=wishes.max_tokens or facts.max_tokens,
    )
