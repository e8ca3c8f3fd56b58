"""Loading: what is refused, and that the reason names the culprit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.kernels.layers.merged import MergedLinear, merge_linears
from diptych.kernels.layers.packed import PackedLinear, pack_linears
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.ops.linear import cpu as linear_cpu
from diptych.kernels.ops.ragged import Segment, build_batch
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.kernels.weights import weights_digest
from diptych.protos.errors import StartupError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, added: dict[str, Tensor], drop: str | None = None) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors | added, path, metadata={"format": "pt"})


def logits_of(model: LoadedModel) -> Tensor:
    shape = (1, model.kv_heads, 8, model.head_dim)
    kv = {layer: (torch.zeros(shape), torch.zeros(shape)) for layer in model.layer_ids}
    batch = build_batch([Segment(0, 5, 0, (0,))], 8, model.device)
    with torch.inference_mode():
        return model.forward(torch.arange(5) + 7, batch, kv, torch.arange(5))


def test_facts_are_those_of_the_configuration(folder: Path) -> None:
    model = load_model(folder, dtype="float32")
    assert (model.layers, model.kv_heads, model.head_dim, model.vocab_size) == (2, 2, 16, 512)
    assert (model.max_context_tokens, model.dtype, model.layer_ids) == (1024, "float32", (0, 1))
    assert model.architecture == "LlamaForCausalLM"
    assert model.degraded == ()
    assert model.weights_bytes >= sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_logits_equal_transformers_own_at_every_position_and_none_are_computed_unasked(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load_model(folder, dtype="float32")
    with torch.inference_mode():
        wanted = load(folder, dtype=torch.float32)(torch.arange(5)[None] + 7).logits[0]
    torch.testing.assert_close(logits_of(model), wanted, atol=1e-4, rtol=1e-4)
    kv = {layer: (torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)) for layer in model.layer_ids}
    batch = build_batch([Segment(0, 5, 0, (0,))], 8, model.device)
    with torch.inference_mode():
        none = model.forward(torch.arange(5), batch, kv, torch.arange(0))
    assert none.shape == (0, 512)


def test_shards_and_base_model_names_load_like_one_file(folder: Path) -> None:
    wanted = logits_of(load_model(folder, dtype="float32"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name.removeprefix("model."): tensors[name] for name in part}, folder / file)
        weight_map |= {name.removeprefix("model."): file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits_of(load_model(folder, dtype="float32")), wanted)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StartupError, match="model-00002-of-00002"):
        load_model(folder, dtype="float32")


def test_experts_in_separate_tensors_load_like_merged_ones(tmp_path: Path) -> None:
    """The layout of the Mixtral checkpoints that people have."""
    folder = make_tiny_checkpoint(tmp_path / "moe", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    wanted = logits_of(load_model(folder, dtype="float32"))
    separate: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.replace(".mlp.", ".block_sparse_moe.")
        for expert in range(4):
            if name.endswith("experts.gate_up_proj"):
                gate, up = tensor[expert].chunk(2)
                old = stem.removesuffix("gate_up_proj")
                separate |= {f"{old}{expert}.w1.weight": gate.clone(), f"{old}{expert}.w3.weight": up.clone()}
            elif name.endswith("experts.down_proj"):
                separate[f"{stem.removesuffix('down_proj')}{expert}.w2.weight"] = tensor[expert].clone()
            else:
                separate[stem] = tensor
    save_file(separate, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits_of(load_model(folder, dtype="float32")), wanted)
    lost = next(name for name in separate if name.endswith("3.w2.weight"))
    edit_tensors(folder, {}, drop=lost)
    with pytest.raises(StartupError, match=r"down_proj|w2"):
        load_model(folder, dtype="float32")


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StartupError, match=r"model\.safetensors is not a readable"):
        load_model(folder, dtype="float32")


def test_an_index_cannot_reach_outside_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(StartupError, match="outside"):
        load_model(folder, dtype="float32")


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, {"model.layers.9.odd": torch.ones(2), "model.norm.weight": torch.ones(63)}, drop=name)
    with pytest.raises(StartupError) as caught:
        load_model(folder, dtype="float32")
    for part in (name, "unexpected: model.layers.9.odd", "[63] instead of [64]"):
        assert part in str(caught.value)


def test_stored_rotary_frequencies_of_old_checkpoints_are_ignored(folder: Path) -> None:
    edit_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert logits_of(load_model(folder, dtype="float32")).isfinite().all()


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "exploded",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(StartupError, match="no weights in safetensors"):
        load_model(folder, dtype="float32")
    assert not (folder / "exploded").exists()


def test_code_in_the_folder_is_refused_and_not_run(folder: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(StartupError, match="auto_map"):
        load_model(folder, dtype="float32")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "nothing_known"}, "nothing_known"),
        ({"model_type": "clip"}, "clip"),
    ],
)
def test_configurations_that_cannot_be_served_are_refused(folder: Path, change: dict[str, Any], match: str) -> None:
    edit_config(folder, **change)
    with pytest.raises(StartupError, match=match):
        load_model(folder, dtype="float32")


def test_broken_or_missing_configuration_and_unknown_dtype(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"float16.*float32, bfloat16"):
        load_model(folder, dtype="float16")
    (folder / "config.json").write_text("{")
    with pytest.raises(StartupError, match="not valid JSON"):
        load_model(folder, dtype="float32")
    with pytest.raises(StartupError, match=r"no config\.json"):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("architecture", "sizes", "match"),
    [
        ("mamba", {"state_size": 8, "num_hidden_layers": 2}, "layer 0 does not dispatch"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layer 0"),
        pytest.param("llama4_text", {}, "unsupported type chunked_attention", marks=pytest.mark.slow),
        ("deepseek_v3", {}, "cannot compute a row"),
        pytest.param("gptj", {}, "cannot build", marks=pytest.mark.slow),
        pytest.param("gemma4_text", {}, "differ in KV heads and head size", marks=pytest.mark.slow),
    ],
)
def test_models_that_attention_does_not_describe_are_refused(
    architecture: str, sizes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", architecture, **sizes)
    with pytest.raises(StartupError, match=match):
        load_model(folder, dtype="float32")


def patched(monkeypatch: pytest.MonkeyPatch, forward: Any) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward(modeling_llama.LlamaAttention.forward))


def test_a_layer_that_mixes_neighbours_outside_of_attention_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution beside attention is right for one prompt alone and wrong for every ragged row."""

    def convolve(original: Any) -> Any:
        def forward(self: nn.Module, hidden_states: Tensor, **rest: Any) -> Any:
            return original(self, hidden_states=hidden_states + hidden_states.roll(1, dims=1), **rest)

        return forward

    patched(monkeypatch, convolve)
    with pytest.raises(StartupError, match="other than attention mixes"):
        load_model(folder, dtype="float32")


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"attention_mask": torch.ones(1)}, "mask of its own"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_arguments_that_cannot_be_honoured_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], match: str
) -> None:
    def adding(original: Any) -> Any:
        return lambda self, **given: original(self, **(given | extra))

    patched(monkeypatch, adding)
    with pytest.raises(StartupError, match=rf"layer 0 \(LlamaAttention\).*{match}"):
        load_model(folder, dtype="float32")


def test_a_layer_that_drops_keyword_arguments_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dropping(original: Any) -> Any:
        def forward(self: nn.Module, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> Any:
            return original(self, hidden_states=hidden_states, position_embeddings=position_embeddings)

        return forward

    patched(monkeypatch, dropping)
    with pytest.raises(StartupError, match="LlamaAttention does not hand keyword arguments"):
        load_model(folder, dtype="float32")


def test_the_digest_sees_weights_and_configuration_but_not_names(folder: Path, tmp_path: Path) -> None:
    first = weights_digest(folder)
    edit_config(folder, _name_or_path="elsewhere", transformers_version="9")
    assert weights_digest(folder) == first
    edit_config(folder, rms_norm_eps=0.1)
    second = weights_digest(folder)
    assert second != first
    other = make_tiny_checkpoint(tmp_path / "other", seed=1, tie_word_embeddings=False)
    assert weights_digest(other) not in (first, second)
    assert len(first) == 32


def test_linears_are_merged_where_alike_and_listed_where_not() -> None:
    class Block(nn.Module):
        def __init__(self, value_bias: bool) -> None:
            super().__init__()
            self.q_proj = nn.Linear(8, 6)
            self.k_proj = nn.Linear(8, 2)
            self.v_proj = nn.Linear(8, 2, bias=value_bias)

        def forward(self, x: Tensor) -> Tensor:
            other = x * 2
            parts = (self.v_proj(x), self.q_proj(x), self.q_proj(other), self.k_proj(x), self.k_proj(x))
            return torch.cat((*parts, self.v_proj(other)), dim=-1)

    model = nn.ModuleList([Block(True), Block(False)])
    x = torch.randn(3, 8)
    with torch.inference_mode():
        wanted = [block(x) for block in model]
        assert merge_linears(model) == ["1.{q_proj,k_proj,v_proj}"]
        assert sum(isinstance(module, MergedLinear) for module in model.modules()) == 1
        pack_linears(model)
        assert not any(type(module) is nn.Linear for module in model.modules())
        for block, output in zip(model, wanted, strict=True):
            for _ in range(2):
                torch.testing.assert_close(block(x), output)


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 300])
def test_packed_linears_compute_what_plain_ones_do(rows: int) -> None:
    source = nn.Linear(48, 80, dtype=torch.bfloat16)
    packed = PackedLinear(source)
    x = torch.randn(1, rows, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        out, wanted = packed(x), source(x)
    assert out.shape == wanted.shape == (1, rows, 80)
    torch.testing.assert_close(out.float(), wanted.float(), atol=2e-2, rtol=2e-2)
    assert packed.op.weight.is_mkldnn == linear_cpu.has_blocked_layout()
