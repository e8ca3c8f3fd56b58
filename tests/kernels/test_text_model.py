"""A step of many texts must give each the numbers that it has alone by transformers' own forward.

Guards: texts of one ragged row that see each other; positions that do not begin anew, or not where a family begins
them; windows; heads that read the wrong token; pooling over another text's tokens; a fallback that nobody takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from diptych.kernels import rows as text_rows
from diptych.kernels.embedding import Pooling, TextModel, TextSpec, load_text_model
from diptych.protos.embedding import TextRow
from diptych.protos.errors import StartupError

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
DECODER = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
ENCODERS = {
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4},
}
DECODERS = {
    "qwen3": DECODER,
    "llama": DECODER,
    "mistral": DECODER | {"sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}
TEXTS = [list(range(5, 5 + length)) for length in (7, 3, 12, 7, 1, 3, 30)]


def saved(folder: Path, kind: str, extra: dict[str, Any], *, has_head: bool = False) -> Path:
    """A model with random weights, large enough to tell mistakes from rounding."""
    config = AutoConfig.for_model(kind, **(SIZES | extra | ({"num_labels": 1} if has_head else {})))
    build: Any = (AutoModelForSequenceClassification if has_head else AutoModel).from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def alone(folder: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers' forward makes of each text by itself: [tokens, width]."""
    build: Any = AutoModel.from_pretrained
    model = build(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]


def pooled(hidden: torch.Tensor, spec: TextSpec) -> np.ndarray[Any, Any]:
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[spec.pooling]
    return (torch.nn.functional.normalize(vector, dim=0) if spec.normalize else vector).numpy()


def rows(texts: list[list[int]]) -> list[TextRow]:
    return [TextRow(text) for text in texts]


def spread(values: np.ndarray[Any, Any]) -> float:
    """How much the numbers differ between texts: what a mistake would be about as large as."""
    return float(np.abs(values - values.mean(0)).max())


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_a_step_of_many_texts_equals_each_of_them_alone(kind: str, tmp_path: Path, place: torch.device) -> None:
    folder = saved(tmp_path, kind, (ENCODERS | DECODERS)[kind])
    spec = TextSpec(pooling="last" if kind in DECODERS else "mean", normalize=False)
    model = load_text_model(folder, spec, dtype="float32", device=str(place))
    expected = np.stack([pooled(hidden, spec) for hidden in alone(folder, TEXTS)])
    found = model.compute(rows(TEXTS))
    assert model.is_ragged, model.degraded
    assert spread(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_padding_of_attention_changes_nothing(
    kind: str, pooling: Pooling, tmp_path: Path, place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, where texts of similar lengths share a call; also with a prompt left out of a mean."""
    folder = saved(tmp_path, kind, (ENCODERS | DECODERS)[kind])
    monkeypatch.setattr(text_rows, "pads_on", lambda device: True)
    spec = TextSpec(pooling=pooling, normalize=False)
    model = load_text_model(folder, spec, dtype="float32", device=str(place))
    assert model.is_ragged, model.degraded
    hidden = alone(folder, TEXTS)
    for skip in (0, 2, 9):
        left_out = skip if pooling == "mean" else 0
        kept = [pooled(states[min(left_out, len(states) - 1) :], spec) for states in hidden]
        np.testing.assert_allclose(model.compute(rows(TEXTS), skip=skip), kept, atol=2e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_reads_the_tokens_of_its_own_text(
    pooling: Pooling, normalize: bool, tmp_path: Path, place: torch.device
) -> None:
    spec = TextSpec(pooling=pooling, normalize=normalize)
    folder = saved(tmp_path, "bert", {})
    found = load_text_model(folder, spec, dtype="float32", device=str(place)).compute(rows(TEXTS))
    np.testing.assert_allclose(found, [pooled(hidden, spec) for hidden in alone(folder, TEXTS)], atol=2e-5)


def test_a_prompt_may_be_left_out_of_a_mean(tmp_path: Path, place: torch.device) -> None:
    folder = saved(tmp_path, "bert", {})
    spec = TextSpec(normalize=False)
    found = load_text_model(folder, spec, dtype="float32", device=str(place)).compute(rows(TEXTS), skip=2)
    kept = [pooled(hidden[min(2, len(hidden) - 1) :], spec) for hidden in alone(folder, TEXTS)]
    np.testing.assert_allclose(found, kept, atol=2e-5)


def test_a_model_that_cannot_be_one_row_is_computed_by_equal_lengths(tmp_path: Path, place: torch.device) -> None:
    """MPNet adds a bias to its scores that it makes of the row's length."""
    folder = saved(tmp_path, "mpnet", {})
    spec = TextSpec(normalize=False)
    model = load_text_model(folder, spec, dtype="float32", device=str(place))
    assert not model.is_ragged
    assert "equal length" in model.degraded[0]
    np.testing.assert_allclose(
        model.compute(rows(TEXTS)), [pooled(hidden, spec) for hidden in alone(folder, TEXTS)], atol=2e-5
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, place: torch.device) -> TextModel:
    return load_text_model(
        saved(tmp_path_factory.mktemp("bert"), "bert", {}), TextSpec(), dtype="float32", device=str(place)
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=40), min_size=1, max_size=12))
def test_company_changes_nothing(small: TextModel, texts: list[list[int]]) -> None:
    together = small.compute(rows(texts))
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(small.compute([TextRow(text)])[0], vector, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "qwen3"])
def test_pairs_are_scored_as_transformers_scores_them(kind: str, tmp_path: Path, place: torch.device) -> None:
    extra = (ENCODERS | DECODERS)[kind]
    folder = saved(tmp_path, kind, extra, has_head=True)
    build: Any = AutoModelForSequenceClassification.from_pretrained
    reference = build(folder, dtype=torch.float32).eval()
    has_types = kind in ("bert", "electra")
    pairs = [TextRow(text, len(text) // 2 if has_types else 0) for text in TEXTS]
    with torch.inference_mode():
        expected = [_score(reference, pair, has_types) for pair in pairs]
    model = load_text_model(folder, TextSpec(scores=True), dtype="float32", device=str(place))
    assert model.is_ragged, model.degraded
    found = model.compute(pairs)
    assert spread(found) > 0.01
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-4)


def _score(model: Any, pair: TextRow, has_types: bool) -> float:
    ids = torch.tensor([list(pair.ids)])
    if not has_types:
        return float(model(input_ids=ids).logits[0, 0])
    types = torch.tensor([[int(0 < pair.second <= at) for at in range(len(pair.ids))]])
    return float(model(input_ids=ids, token_type_ids=types).logits[0, 0])


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, place: torch.device) -> None:
    folder = saved(tmp_path, "bert", {})
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"BertModel.*not finite"):
        load_text_model(folder, TextSpec(), dtype="float32", device=str(place))


def test_a_folder_without_its_head_is_refused(tmp_path: Path, place: torch.device) -> None:
    folder = saved(tmp_path, "bert", {})
    with pytest.raises(StartupError, match="classifier"):
        load_text_model(folder, TextSpec(scores=True), dtype="float32", device=str(place))


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path, place: torch.device) -> None:
    AutoConfig.for_model("t5", vocab_size=60).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="t5"):
        load_text_model(tmp_path, TextSpec(), dtype="float32", device=str(place))


def test_random_weights_need_no_files_and_are_the_same_for_a_seed(tmp_path: Path, place: torch.device) -> None:
    AutoConfig.for_model("bert", **SIZES).save_pretrained(tmp_path)
    one, other = (
        load_text_model(tmp_path, TextSpec(), dtype="float32", device=str(place), random_seed=1) for _ in range(2)
    )
    np.testing.assert_array_equal(one.compute(rows(TEXTS)), other.compute(rows(TEXTS)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_bfloat16_on_a_card_is_near(kind: str, tmp_path: Path, place: torch.device) -> None:
    folder = saved(tmp_path, kind, (ENCODERS | DECODERS)[kind])
    spec = TextSpec(pooling="last" if kind in DECODERS else "mean")
    model = load_text_model(folder, spec, dtype="bfloat16", device=str(place))
    expected = np.stack([pooled(hidden, spec) for hidden in alone(folder, TEXTS)])
    assert model.is_ragged, model.degraded
    assert ((model.compute(rows(TEXTS)) * expected).sum(axis=1) > 0.99).all()
