"""What a hand-written decoder needs to know of a model, from config.json alone: a start without transformers is seconds
shorter. A field that the family's class in transformers gives a default has the same here. Whatever is out of the
ordinary raises GenericOnly: then transformers' own code computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DENSE: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
SPARSE: Final = frozenset({"MixtralForCausalLM", "Qwen3MoeForCausalLM"})
_MISSING: Final = object()


class GenericOnly(Exception):
    """The model, or something in its configuration, has no hand-written decoder. The text says what, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """Of every sparse layer."""

    num: int
    top_k: int
    intermediate: int
    renormalise: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Pre-norm decoder layers with rotary positions, RMSNorm and SiLU-gated MLPs."""

    architecture: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of dense layers
    eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool  # queries and keys are normalised
    tied: bool  # the head is the embedding, unless a checkpoint holds another
    windows: tuple[int | None, ...]  # by layer
    experts: ExpertsShape | None
    sparse: tuple[bool, ...]  # by layer
    rope: Mapping[str, Any]  # rope_type, rope_theta and what the type reads
    max_context_tokens: int
    initializer_range: float


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape in a config.json. GenericOnly where hand-written code does not serve it, a malformed one included:
    transformers finds better words for what is wrong with it.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name not in DENSE | SPARSE:
        raise GenericOnly("there is no hand-written decoder for it")
    try:
        shape = _shape(name, _Fields(config))
    except (TypeError, ValueError, AttributeError) as exc:
        raise GenericOnly(f"its config.json is unusual: {exc!r}") from exc
    sizes = (shape.vocab_size, shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim)
    if min(sizes) <= 0 or shape.heads % shape.kv_heads or shape.head_dim % 2 or len(shape.windows) != shape.layers:
        raise GenericOnly("its sizes are unusual")
    return shape


class _Fields:
    """A configuration's values; one that has no default here must be there."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def get(self, key: str, default: Any = _MISSING) -> Any:
        value = self._config.get(key, _MISSING)
        if value is _MISSING:
            value = default
        if value is _MISSING:
            raise GenericOnly(f"its config.json does not say {key}")
        return value

    def size(self, key: str, default: Any = _MISSING) -> int:
        value = self.get(key, default)
        if type(value) is not int:
            raise GenericOnly(f"{key} in its config.json is {value!r}")
        return value


def _shape(name: str, fields: _Fields) -> DecoderShape:
    if fields.get("hidden_act", "silu") != "silu":
        raise GenericOnly(f"its activation is {fields.get('hidden_act')}")
    layers = fields.size("num_hidden_layers")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.get("num_key_value_heads")
    # Qwen3's default is 128, Qwen3-MoE's is hidden / heads: a file that leaves it out is left to transformers.
    head_dim = fields.get("head_dim", None if not name.startswith("Qwen3") else _MISSING)
    bias = fields.get("attention_bias", False) if name.startswith(("Llama", "Qwen3")) else False
    experts, sparse = _experts(name, fields, layers)
    return DecoderShape(
        architecture=name,
        vocab_size=fields.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        intermediate=fields.size("intermediate_size"),
        eps=float(fields.get("rms_norm_eps")),
        qkv_bias=bias or name.startswith("Qwen2"),
        out_bias=bias,
        mlp_bias=name.startswith("Llama") and fields.get("mlp_bias", False),
        head_norms=name.startswith("Qwen3"),
        tied=fields.get("tie_word_embeddings", False),
        windows=_windows(name, fields, layers),
        experts=experts,
        sparse=sparse,
        rope=_rope(fields),
        max_context_tokens=fields.size("max_position_embeddings"),
        initializer_range=float(fields.get("initializer_range", 0.02)),
    )


def _experts(name: str, fields: _Fields, layers: int) -> tuple[ExpertsShape | None, tuple[bool, ...]]:
    if name not in SPARSE:
        return None, (False,) * layers
    top_k = fields.size("num_experts_per_tok")
    if name == "MixtralForCausalLM":
        inner = fields.size("intermediate_size")
        return (
            ExpertsShape(num=fields.size("num_local_experts"), top_k=top_k, intermediate=inner, renormalise=True),
            (True,) * layers,
        )
    # transformers 5 writes it as num_local_experts, files before it as num_experts.
    num = fields.get("num_experts", None)
    shape = ExpertsShape(
        num=fields.size("num_local_experts") if num is None else fields.size("num_experts"),
        top_k=top_k,
        intermediate=fields.size("moe_intermediate_size"),
        renormalise=fields.get("norm_topk_prob", False),
    )
    dense, step = fields.get("mlp_only_layers", None) or (), fields.size("decoder_sparse_step", 1)
    return shape, tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _windows(name: str, fields: _Fields, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer: how many positions a token sees, its own included."""
    if name == "LlamaForCausalLM":
        return (None,) * layers
    if name in ("MistralForCausalLM", "MixtralForCausalLM"):
        if fields.get("layer_types", None) is not None:
            raise GenericOnly("its layers have types")
        return (fields.get("sliding_window", 4096 if name.startswith("Mistral") else None),) * layers
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None
    if name == "Qwen3MoeForCausalLM":
        return (window,) * layers
    types = fields.get("layer_types", None)
    if types is None:
        first = fields.size("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not set(types) <= {"full_attention", "sliding_attention"} or (window is None and "sliding_attention" in types):
        raise GenericOnly(f"its layers are of types {sorted(set(types))}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope(fields: _Fields) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5, and `rope_scaling` beside `rope_theta` before it."""
    found = dict(fields.get("rope_scaling", None) or fields.get("rope_parameters", None) or {})
    found["rope_type"] = found.get("rope_type", found.pop("type", "default"))
    if "rope_theta" not in found:
        found["rope_theta"] = fields.get("rope_theta")
    if found.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise GenericOnly("only a part of each head is rotated")
    return found
