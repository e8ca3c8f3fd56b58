"""Hand-written decoders, and transformers' models over a device's steps, compute what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device_steps import BLOCK, NUM_BLOCKS, STEPS, device_logits, ids_of, layout, new_kv, step_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.kernels.attention import AttentionStep
from diptych.kernels.device.step import KV_NOT_FINITE
from diptych.kernels.model import LoadedModel, load_hand_written, load_model
from diptych.kernels.models.decoder import Decoder
from diptych.kernels.models.generic import GenericDecoder
from diptych.kernels.ops.ragged import build_batch
from diptych.kernels.testing import ARCHITECTURES, make_tiny_checkpoint
from diptych.protos.errors import StartupError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral")
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": _LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "biases": ("qwen3", {"attention_bias": True}),
    "every-other-layer-sparse": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 3,
            "norm_topk_prob": True,
        },
    ),
    "windows-of-mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
}


def folder_of(name: str, tmp_path: Path) -> Path:
    if name in VARIANTS:
        architecture, sizes = VARIANTS[name]
        return make_tiny_checkpoint(tmp_path / "model", architecture, **sizes)
    return ARCHITECTURES[name].make(tmp_path / "model")


def by_hand(folder: Path, place: torch.device, dtype: str = "float32", seed: int | None = None) -> LoadedModel:
    config = json.loads((folder / "config.json").read_text())
    return load_hand_written(folder, config, dtype=dtype, place=place, random_seed=seed)


def wanted_logits(model: LoadedModel) -> Tensor:
    """The same steps by the CPU's path."""
    shape = (NUM_BLOCKS, model.kv_heads, BLOCK, model.head_dim)
    dtype = getattr(torch, model.dtype)
    kv = {layer: (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for layer in model.layer_ids}
    found = []
    assert model.compute is not None
    for salt, rows in enumerate(STEPS):
        batch = build_batch(layout(rows), BLOCK, torch.device("cpu"))
        kept = torch.arange(0, batch.num_tokens, 2).flip(0)
        found.append(model.compute(ids_of(batch.num_tokens, salt), AttentionStep(batch, kv), kept).float())
    return torch.cat(found)


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, place: torch.device) -> None:
    folder = folder_of(name, tmp_path)
    model, theirs = by_hand(folder, place), load_model(folder, dtype="float32")
    assert (model.kv_heads, model.head_dim, model.layers, model.layer_ids, model.vocab_size) == (
        theirs.kv_heads,
        theirs.head_dim,
        theirs.layers,
        theirs.layer_ids,
        theirs.vocab_size,
    )
    assert (model.heads, model.windows, model.max_context_tokens) == (
        theirs.heads,
        theirs.windows,
        theirs.max_context_tokens,
    )
    assert model.weights_digest == theirs.weights_digest
    with torch.inference_mode():
        decoder = model.decoder(max_tokens=64)
        assert isinstance(decoder, Decoder)
        torch.testing.assert_close(device_logits(model, decoder, place), wanted_logits(theirs), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_bfloat16_is_as_near_to_float32_as_transformers_own(name: str, tmp_path: Path, place: torch.device) -> None:
    folder = folder_of(name, tmp_path)
    exact = load_model(folder, dtype="float32")
    model, theirs = by_hand(folder, place, "bfloat16"), load_model(folder, dtype="bfloat16")
    with torch.inference_mode():
        wanted = wanted_logits(exact)
        mine = (device_logits(model, model.decoder(max_tokens=64), place) - wanted).norm(dim=-1)
        other = (wanted_logits(theirs) - wanted).norm(dim=-1)
    # The median of the tokens: rounding may turn the choice between two near-equal experts, in either path.
    assert mine.median() <= 1.25 * other.median()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt-oss", "olmo2", "mixtral", "qwen3"])
def test_other_models_run_by_transformers_forward_over_a_devices_steps(
    name: str, tmp_path: Path, place: torch.device
) -> None:
    folder = folder_of(name, tmp_path)
    theirs = load_model(folder, dtype="float32")
    model = theirs
    if place.type == "cuda":
        model = load_model(folder, dtype="float32", device="cuda:0", by_hand=name not in FAMILIES)
        missing = "not by hand-written code: there is no hand-written decoder for it"
        assert any(missing in reason for reason in model.degraded) == (name not in FAMILIES)
    assert model.module is not None
    with torch.inference_mode():
        decoder = GenericDecoder(model.module, model.layer_ids, capturable=True)
        torch.testing.assert_close(device_logits(model, decoder, place), wanted_logits(theirs), atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_step_that_wants_no_logits_stores_keys_and_values_all_the_same(
    name: str, tmp_path: Path, place: torch.device
) -> None:
    model = by_hand(folder_of(name, tmp_path), place)
    with torch.inference_mode():
        decoder = model.decoder(max_tokens=32)
        stored = []
        for kept in (torch.arange(9), torch.arange(0)):
            kv = new_kv(model, place)
            step = step_of(model, layout([(0, 0, 9)]), ids_of(9, 1), kept, place)
            decoder.forward(step, kv, torch.empty(len(kept), model.vocab_size, device=place))
            stored.append(torch.stack([tensor.nan_to_num(-9.0) for pair in kv for tensor in pair]))
        assert torch.equal(*stored)
        assert (stored[0] != -9.0).sum() == 2 * model.layers * 9 * model.kv_heads * model.head_dim


def test_keys_that_are_not_finite_mark_their_row_alone(tmp_path: Path, place: torch.device) -> None:
    model = by_hand(folder_of("llama", tmp_path), place)
    with torch.inference_mode():
        assert model.by_hand is not None
        model.by_hand.tensors.embedding[31] = float("nan")
        decoder = model.decoder(max_tokens=32)
        segments = layout([(0, 0, 1), (1, 0, 5), (2, 0, 3)])
        ids = torch.tensor([1, 2, 3, 31, 4, 5, 6, 7, 8])
        step = step_of(model, segments, ids, torch.tensor([0, 5, 8]), place)
        logits = torch.empty(3, model.vocab_size, device=place)
        decoder.forward(step, new_kv(model, place), logits)
    assert step.flags_R.tolist() == [0, KV_NOT_FINITE, 0]
    assert logits.isfinite().all(dim=1).tolist() == [True, False, True]


def test_more_tokens_than_it_was_made_for_are_refused(tmp_path: Path, place: torch.device) -> None:
    model = by_hand(folder_of("llama", tmp_path), place)
    step = step_of(model, layout([(0, 0, 9)]), ids_of(9, 1), torch.arange(1), place)
    with pytest.raises(ValueError, match="9 tokens of at most 8"):
        model.decoder(max_tokens=8).forward(step, new_kv(model, place), torch.empty(1, 512, device=place))


def rename(folder: Path, spelling: dict[str, str], prefix: str) -> None:
    """Experts one by one under these names, the router under `prefix`: as the families' own checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    told: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, _, leaf = name.rpartition(".")
        before, name = before.replace(".mlp", prefix), name.replace(".mlp", prefix)
        if leaf == "gate_up_proj":
            for index, both in enumerate(tensor):
                for key, part in zip(("gate", "up"), both.chunk(2), strict=True):
                    told[f"{before}.{index}.{spelling[key]}.weight"] = part.contiguous()
        elif leaf == "down_proj":
            told |= {
                f"{before}.{index}.{spelling['down']}.weight": one.contiguous() for index, one in enumerate(tensor)
            }
        else:
            told[name] = tensor
    save_file(told, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_may_come_one_by_one(name: str, tmp_path: Path, place: torch.device) -> None:
    folder = folder_of(name, tmp_path)
    whole = by_hand(folder, place)
    spelling = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if name == "mixtral":
        rename(folder, {"gate": "w1", "up": "w3", "down": "w2"}, ".block_sparse_moe")
    else:
        rename(folder, spelling, ".mlp")
    single = by_hand(folder, place)
    assert whole.by_hand is not None
    assert single.by_hand is not None
    for (key, mine), (_, other) in zip(single.by_hand.tensors.each(), whole.by_hand.tensors.each(), strict=True):
        assert torch.equal(mine, other), key


@pytest.mark.parametrize("how", ["missing", "unexpected", "misshapen", "one expert"])
def test_files_that_do_not_fit_are_refused_by_name(how: str, tmp_path: Path) -> None:
    folder = folder_of("qwen3-moe", tmp_path)
    if how == "one expert":
        rename(folder, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, ".mlp")
    tensors = load_file(folder / "model.safetensors")
    norm = "model.layers.1.post_attention_layernorm.weight"
    match how:
        case "missing":
            del tensors[norm]
        case "unexpected":
            tensors["model.layers.1.mlp.shared_expert.weight"] = torch.zeros(2)
        case "misshapen":
            tensors[norm] = torch.zeros(63)
        case _:
            del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    wanted = {
        "missing": rf"missing: {norm}",
        "unexpected": "unexpected: model.layers.1.mlp.shared_expert.weight",
        "misshapen": rf"not fitting: {norm} \[63\] instead of \[64\]",
        "one expert": r"missing: model.layers.1.mlp.experts.2.up_proj.weight",
    }[how]
    with pytest.raises(StartupError, match=wanted):
        by_hand(folder, torch.device("cpu"))


def test_a_tied_model_may_bring_a_head_of_its_own(tmp_path: Path) -> None:
    """As _retie in weights.py: it was not tied when it was saved."""
    folder = make_tiny_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for head, tied in ((None, True), (embedding.clone(), True), (embedding * 2, False)):
        if head is not None:
            save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        model = by_hand(folder, torch.device("cpu"))
        assert model.by_hand is not None
        assert (model.by_hand.tensors.head is model.by_hand.tensors.embedding) == tied
        assert torch.equal(model.by_hand.tensors.embedding, embedding)
        assert torch.equal(model.by_hand.tensors.head, embedding if head is None else head)
