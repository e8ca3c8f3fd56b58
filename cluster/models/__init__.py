"""Models on disk: what a model source means, a folder of safetensors and its facts. No torch, transformers or ray."""

from .defaults import NO_DEFAULTS, SamplingDefaults
from .facts import ModelFacts, ModelFolder
from .source import built_in, resolve

__all__ = ["NO_DEFAULTS", "ModelFacts", "ModelFolder", "SamplingDefaults", "built_in", "resolve"]
