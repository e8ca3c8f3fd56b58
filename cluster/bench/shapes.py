"""Models that a benchmark knows by name: their shape only, since random weights are as fast as trained ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diptych.cluster.models.facts import ModelFacts, ModelFolder
from diptych.protos.errors import StartupError

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}


def write_shape(name: str, folder: Path) -> ModelFolder:
    """The shape's config.json in `folder`, with its facts."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    return shape_of(folder, name)


def shape_of(folder: Path, name: str) -> ModelFolder:
    """The facts of a folder that needs to hold no more than a config.json. Raises StartupError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= config.get("text_config", {})
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", heads)
        layers, vocab_size = config["num_hidden_layers"], config["vocab_size"]
        longest = config["max_position_embeddings"]
        (architecture,) = config["architectures"]
    except OSError as exc:
        raise StartupError(f"{path} cannot be read ({exc.strerror}): --random-weights needs the model's shape") from exc
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as exc:
        raise StartupError(f"{path} does not describe the shape of a model: {exc!r}") from exc
    sizes = (layers, kv_heads, head_dim, vocab_size, longest)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise StartupError(f"{path} does not describe the shape of a model: its sizes are {sizes}")
    facts = ModelFacts(
        name=name,
        architecture=str(architecture),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_context_tokens=longest,
        weights_bytes=0,
        num_parameters=0,
        eos_token_ids=(),
        bos_token_id=None,
        dtype="bfloat16",
        chat_template=None,
    )
    return ModelFolder(folder, facts)
