"""Tiny models made on the spot, and one conversion of the default model for the whole session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from diptych.cluster.models import ModelFolder, resolve

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_letters() -> list[str]:
    """GPT-2's 256 letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = {byte: 0x100 + place for place, byte in enumerate(b for b in range(256) if b not in plain)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def tiny_weights() -> dict[str, np.ndarray[Any, Any]]:
    """Float32 weights of a two-layer llama under transformers' names."""
    rng = np.random.default_rng(7)
    vocab = len(SPECIALS) + 256 + 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to a query or key projection, row by row."""
    head_dim = len(weight) // heads
    half = head_dim // 2
    order = [head * head_dim + part * half + row for head in range(heads) for row in range(half) for part in (0, 1)]
    return weight[order]


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight."""
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def write_tiny_gguf(
    path: Path,
    *,
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    quantise: gguf.GGMLQuantizationType | None = None,
    arch: str = "llama",
    pre: str = "smollm",
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A whole GGUF file of a tiny llama; `edit` may add metadata or tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*SPECIALS, *byte_letters(), "he", "\u0120t"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["h e", "\u0120 t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in (tiny_weights() if weights is None else weights).items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        data = value if heads is None else permuted(value, heads)
        if quantise is not None and data.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data))
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """`write_tiny_gguf`, for files that differ from the plain one."""
    return write_tiny_gguf


@pytest.fixture
def weights() -> dict[str, np.ndarray[Any, Any]]:
    """What the tiny GGUF file holds, under transformers' names."""
    return tiny_weights()


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "Tiny.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that passes every check; the tests spoil it."""
    from safetensors.numpy import save_file

    path = tmp_path / "tiny"
    path.mkdir()
    weights: dict[str, np.ndarray[Any, Any]] = {
        "model.embed_tokens.weight": np.zeros((10, 8), np.float16),
        "model.layers.0.mlp.up_proj.weight": np.zeros((4, 8), np.float16),
        "model.norm.weight": np.zeros((8,), np.float32),
    }
    save_file(weights, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 8,
        "vocab_size": 10,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    return path


@pytest.fixture(scope="session")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFolder]:
    """The default model, converted anew (about 4 s) and removed at the end: it is 270 MB."""
    cache = tmp_path_factory.mktemp("cache")
    yield resolve("smollm2-135m-instruct", cache)
    shutil.rmtree(cache)
