"""Small random checkpoints for tests of any floor: a config.json and safetensors, no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class TinyArchitecture:
    """A tiny model of one family: transformers' `model_type` and the fields that bring out what the family can do."""

    model_type: str
    sizes: Mapping[str, Any] = field(default_factory=dict)  # over the sizes that all share

    def make(self, folder: Path, seed: int = 0) -> Path:
        """Write a random checkpoint into `folder` and return it. Its context has 640 positions."""
        return make_tiny_checkpoint(folder, self.model_type, seed, **{"max_position_embeddings": 640, **self.sizes})


_ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 640, "n_inner": 128}

# The families that are served, each with its own features on: windows shorter than most prompts, caps, sinks, experts.
ARCHITECTURES: Mapping[str, TinyArchitecture] = {
    "llama": TinyArchitecture(
        "llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}
    ),
    "mistral": TinyArchitecture("mistral", {"sliding_window": 9, "num_hidden_layers": 3}),
    "qwen2": TinyArchitecture("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": TinyArchitecture("qwen3", {"tie_word_embeddings": False}),
    "qwen3-moe": TinyArchitecture(
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "mixtral": TinyArchitecture("mixtral", _EXPERTS),
    "gemma2": TinyArchitecture(
        "gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0} | _ALTERNATING
    ),
    "gemma3": TinyArchitecture("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 16} | _ALTERNATING),
    "phi3": TinyArchitecture("phi3"),
    "olmo2": TinyArchitecture("olmo2"),
    "gpt-oss": TinyArchitecture("gpt_oss", {"sliding_window": 8} | _EXPERTS | _ALTERNATING),
    "gpt2": TinyArchitecture("gpt2", _GPT2),
    "gpt-bigcode": TinyArchitecture("gpt_bigcode", {**_GPT2, "multi_query": True}),
}


def make_tiny_checkpoint(folder: Path, architecture: str = "llama", seed: int = 0, **sizes: Any) -> Path:
    """Write a random model of a transformers `model_type` into `folder` (made if need be) and return it.

    `sizes` are configuration fields over those above. Weights are larger than usual, so that greedy choices are clear.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(_SIZES | {"initializer_range": 0.2} | sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, dtype=torch.float32)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.to_json_file(folder / "config.json", use_diff=False)
    return folder
