"""What the models behind Amazon Bedrock's Converse take beyond what Converse itself says, by the names of their makers.

For bedrock_requests.py. Of a name without a maker (an application's inference profile, an imported model) nothing is
assumed but Converse. Facts: docs.aws.amazon.com/bedrock and /nova (model cards, structured output, tool use) and
pydantic-ai's measured profiles 2.68, all read 2026-11-23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .claude_models import Claude, claude_of

_ARN = re.compile(r"arn:[^:]+:bedrock:[^:]*:[^:]*:(?:inference-profile|foundation-model)/(.+)")
_REGION = re.compile(r"(?:us-gov|us|eu|apac|jp|au|ca|in|global)\.")
_FORCED = frozenset({"anthropic", "amazon", "mistral", "zai", "moonshot", "moonshotai", "xai"})
_STRUCTURED = re.compile(
    r"(?:qwen\.qwen3|mistral\.(?:magistral-small|ministral-3|mistral-large-3|voxtral)|google\.gemma-3-(?:12|27)b|zai\."
    r"|moonshot(?:ai)?\.|minimax\.minimax-m2|nvidia\.nemotron-nano|openai\.gpt-oss|deepseek\.v3)"
)
_MOST = {"high": "high", "xhigh": "high", "max": "high"}
_WORDS = {"minimal": "low", "low": "low", "medium": "medium", **_MOST}
_LOW_OR_HIGH = {"none": "none", "minimal": "low", "low": "low", "medium": "high", **_MOST}
_ON_OFF = {"none": "none", "minimal": "high", "low": "high", "medium": "high", **_MOST}
_OWN_WORDS = {"none": "none", **_WORDS, "xhigh": "xhigh", "max": "max"}  # OpenAI's


@dataclass(frozen=True, slots=True, kw_only=True)
class Efforts:
    """How reasoning is asked for: a path in additionalModelRequestFields, and the model's words for ours."""

    path: str
    words: Mapping[str, str]


# By the beginning of maker and name; the first that fits.
_EFFORTS: tuple[tuple[str, Efforts], ...] = (
    ("openai.gpt-oss", Efforts(path="reasoning_effort", words=_WORDS)),
    ("openai.", Efforts(path="reasoning.effort", words=_OWN_WORDS)),
    ("qwen.qwen3-coder", Efforts(path="", words={})),
    ("qwen.qwen3", Efforts(path="reasoning_config", words=_LOW_OR_HIGH)),
    ("deepseek.v3.2", Efforts(path="reasoning_effort", words=_ON_OFF)),
    ("zai.glm-5.3", Efforts(path="reasoning_effort", words={"none": "low", **_WORDS})),
    ("zai.", Efforts(path="reasoning_effort", words=_ON_OFF)),
    ("xai.", Efforts(path="reasoning.effort", words={"none": "low", **_WORDS})),
    ("amazon.nova-2", Efforts(path="reasoningConfig.maxReasoningEffort", words=_WORDS)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BedrockModel:
    """One model: `maker`, empty where the name has none, and the name behind it; `claude` where it is one."""

    maker: str
    name: str
    claude: Claude | None = field(default=None)

    @property
    def _full(self) -> str:
        return f"{self.maker}.{self.name}"

    @property
    def samples(self) -> bool:
        """Takes temperature, topP and its own top_k."""
        if self.maker == "xai" or (self.maker == "openai" and not self.name.startswith("gpt-oss")):
            return False
        return self.claude is None or self.claude.samples

    @property
    def top_k_path(self) -> str:
        """Where top_k stands in additionalModelRequestFields; empty: nowhere."""
        if self.claude is not None or self.maker == "anthropic":
            return "top_k"
        return "inferenceConfig.topK" if self._full.startswith("amazon.nova") else ""

    @property
    def efforts(self) -> Efforts | None:
        """How much a model that is no Claude reasons; None: it cannot be told."""
        found = next((efforts for start, efforts in _EFFORTS if self._full.startswith(start)), None)
        return found if found is not None and found.path else None

    @property
    def is_nova_2(self) -> bool:
        """Whose reasoning is switched on by a field of its own, and at its height leaves no setting."""
        return self._full.startswith("amazon.nova-2")

    @property
    def forced_calls(self) -> bool:
        """Takes a toolChoice that demands a call."""
        if self.claude is not None:
            return self.claude.forced_calls
        return not self.maker or self.maker in _FORCED

    @property
    def structured(self) -> bool:
        """Can be held to a JSON schema."""
        if self.claude is not None:
            return self.claude.structured
        return not self.maker or _STRUCTURED.match(self._full) is not None

    @property
    def prefill(self) -> bool:
        """Goes on with an assistant's message that is the last one."""
        return self.claude is not None and self.claude.prefill

    @property
    def replays_reasoning(self) -> bool:
        """Takes its reasoning back; others refuse messages that have some."""
        return self.claude is not None or not self.maker or self._full.startswith("deepseek.r1")

    @property
    def results_are_json(self) -> bool:
        """Takes what came of a tool's call as JSON, not as a text."""
        return self.maker == "mistral"


def model_of(model_id: str) -> BedrockModel:
    """The model behind an id, an ARN or the id of an inference profile."""
    arn = _ARN.fullmatch(model_id)
    found = arn[1] if arn is not None else model_id
    region = _REGION.match(found)
    maker, dot, name = (found[region.end() :] if region else found).partition(".")
    if not dot or ":" in maker or "/" in maker:
        maker, name = "", found
    return BedrockModel(maker=maker, name=name, claude=claude_of(name))
