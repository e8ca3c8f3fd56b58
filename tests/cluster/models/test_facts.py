"""ModelFacts from a folder, and the refusals: each names the file and the remedy."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diptych.cluster.bench.shapes import SHAPES
from diptych.cluster.models import resolve
from diptych.cluster.models.facts import read_facts
from diptych.protos.errors import StartupError


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value |= changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_facts_are_those_of_config_and_headers(folder: Path) -> None:
    facts = read_facts(folder, "tiny")
    assert (facts.name, facts.architecture) == ("tiny", "LlamaForCausalLM")
    assert (facts.layers, facts.kv_heads, facts.head_dim) == (1, 2, 2)
    assert (facts.vocab_size, facts.max_context_tokens) == (10, 64)
    assert (facts.num_parameters, facts.weights_bytes) == (80 + 32 + 8, 160 + 64 + 32)
    assert (facts.eos_token_ids, facts.bos_token_id) == ((2,), 1)
    assert facts.dtype == "float16"
    assert facts.chat_template is None


def test_without_weights_config_and_tokenizer_are_enough_and_each_is_missed_by_name(folder: Path) -> None:
    whole = read_facts(folder, "tiny")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    facts = resolve(str(folder), folder / "cache", has_weights=False).facts
    assert (facts.layers, facts.kv_heads, facts.head_dim) == (whole.layers, whole.kv_heads, whole.head_dim)
    assert (facts.vocab_size, facts.max_context_tokens) == (whole.vocab_size, whole.max_context_tokens)
    assert (facts.dtype, facts.weights_bytes) == ("bfloat16", 0)
    with pytest.raises(StartupError, match=r"holds no \*\.safetensors"):
        resolve(str(folder), folder / "cache")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(StartupError, match=f"{name} is missing"):
            resolve(str(folder), folder / "cache", has_weights=False)


@pytest.mark.parametrize(("shape", "billions"), [("smollm2-135m", 0.1345), ("llama-8b", 8.03), ("qwen3-30b-a3b", 30.5)])
def test_the_memory_plan_of_a_shape_knows_its_size(folder: Path, shape: str, billions: float) -> None:
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    assert read_facts(folder, shape, has_weights=False).num_parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_kv_heads_default_to_heads_and_head_dim_may_be_given(folder: Path) -> None:
    edit_json(folder / "config.json", num_key_value_heads=None, head_dim=6)
    facts = read_facts(folder, "tiny")
    assert (facts.kv_heads, facts.head_dim) == (4, 6)


def test_names_of_gpt2_are_understood(folder: Path) -> None:
    none = dict.fromkeys(
        ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "max_position_embeddings"]
    )
    edit_json(folder / "config.json", **none)
    edit_json(folder / "config.json", n_layer=1, n_head=2, n_embd=8, n_positions=32)
    facts = read_facts(folder, "tiny")
    assert (facts.layers, facts.kv_heads, facts.head_dim, facts.max_context_tokens) == (1, 2, 4, 32)


def test_generation_config_decides_the_end_tokens(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[3, 4, 3])
    assert read_facts(folder, "tiny").eos_token_ids == (3, 4)


def test_a_model_may_have_no_end_token(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=None, bos_token_id=None)
    facts = read_facts(folder, "tiny")
    assert (facts.eos_token_ids, facts.bos_token_id) == ((), None)


def test_chat_template_file_wins_over_tokenizer_config(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="old")
    assert read_facts(folder, "tiny").chat_template == "old"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert read_facts(folder, "tiny").chat_template == "d"
    (folder / "chat_template.jinja").write_text("new")
    assert read_facts(folder, "tiny").chat_template == "new"


def test_a_folder_is_used_where_it_lies(folder: Path, tmp_path: Path) -> None:
    found = resolve(str(folder), tmp_path / "cache")
    assert (found.path, found.facts.name) == (folder, "tiny")
    assert not (tmp_path / "cache").exists()


def shard(folder: Path, **weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_chooses_the_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    shard(folder, **dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    assert read_facts(folder, "tiny").num_parameters == 120


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def pickle_in_disguise(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def doubled(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "a.safetensors")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "is not JSON"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "auto_map": (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "m.M"}), "never run"),
    "nested auto_map": (lambda f: edit_json(f / "config.json", text_config={"auto_map": {}}), "never run"),
    "remote code": (lambda f: edit_json(f / "tokenizer_config.json", trust_remote_code=True), "never run"),
    "tokenizer code": (lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T"]}), "never"),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "unquantised"),
    "no layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=None), "num_hidden_layers is missing"),
    "zero layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=0), "num_hidden_layers is 0"),
    "many layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000"),
    "layer lost": (lambda f: edit_json(f / "config.json", num_hidden_layers=2), "no layer 1"),
    "bool heads": (lambda f: edit_json(f / "config.json", num_attention_heads=True), "num_attention_heads is True"),
    "float vocab": (lambda f: edit_json(f / "config.json", vocab_size=10.0), "vocab_size is 10.0"),
    "text context": (lambda f: edit_json(f / "config.json", max_position_embeddings="64"), "is '64'"),
    "uneven heads": (lambda f: edit_json(f / "config.json", num_key_value_heads=3), "no multiple"),
    "uneven size": (lambda f: edit_json(f / "config.json", hidden_size=9), "no multiple"),
    "wrong vocab": (lambda f: edit_json(f / "config.json", vocab_size=11), "embeddings"),
    "eos outside": (lambda f: edit_json(f / "config.json", eos_token_id=10), "below vocab_size 10"),
    "eos no number": (lambda f: edit_json(f / "config.json", eos_token_id=["2"]), "'2'"),
    "no class": (lambda f: edit_json(f / "config.json", architectures=None), "architectures"),
    "class no name": (lambda f: edit_json(f / "config.json", architectures=["os.system"]), "architectures"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "strange tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "no `model`"),
    "bad template": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
    "pickle": (pickled, "pytorch_model.bin"),
    "pickle in disguise": (pickle_in_disguise, "pickle archive"),
    "truncated": (truncated, "truncated"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated"),
    "lfs pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "git lfs pull"),
    "tensor twice": (doubled, "a second time"),
    "index empty": (lambda f: shard(f), "no weight_map"),
    "shard missing": (lambda f: shard(f, a="model-2.safetensors"), "model-2.safetensors is missing"),
    "tensor missing": (lambda f: shard(f, a="model.safetensors"), "lacks a"),
    "shard outside": (lambda f: shard(f, a="../model.safetensors"), "same folder"),
    "shard absolute": (lambda f: shard(f, a="/etc/model.safetensors"), "same folder"),
    "shard no name": (lambda f: shard(f, a=7), "same folder"),
    "shard a pickle": (lambda f: shard(f, a="pytorch_model.bin"), "same folder"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_refused_with_its_file_and_a_reason(folder: Path, tmp_path: Path, case: str) -> None:
    spoil, reason = SPOILT[case]
    spoil(folder)
    with pytest.raises(StartupError) as caught:
        resolve(str(folder), tmp_path / "cache")
    assert reason in str(caught.value)
    assert str(folder) in str(caught.value)
    assert str(caught.value).endswith(".")
