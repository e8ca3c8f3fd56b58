"""The built-in model `echo`: its words are its tokens, any text survives, and nothing but the sizes can be chosen."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from diptych.cluster.api.render import Renderer
from diptych.cluster.api.text import TokenTable
from diptych.cluster.config import load_config
from diptych.cluster.models import ModelFolder, built_in, resolve
from diptych.protos.echo import ASSISTANT, BAD, END, NAMES, NUM_WORDS, STOP, USER, VOCAB_SIZE
from diptych.protos.errors import StartupError
from diptych.protos.messages import said
from diptych.protos.settings import EchoSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return resolve("echo", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder: ModelFolder) -> Tokenizer:
    return Tokenizer.from_file(str(folder.path / "tokenizer.json"))


def test_it_is_built_in_with_the_sizes_that_are_asked_for(tmp_path: Path) -> None:
    assert "echo" in built_in()
    facts = resolve("echo", tmp_path, echo=EchoSettings(layers=5, kv_heads=3, head_dim=12)).facts
    assert (facts.layers, facts.kv_heads, facts.head_dim) == (5, 3, 12)
    assert facts.num_parameters == 0
    assert facts.eos_token_ids == (END,)


def test_every_id_has_a_token_and_every_word_is_its_number(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert all(tokenizer.id_to_token(number) for number in range(VOCAB_SIZE))
    numbers = [0, 17, 17, 999, NUM_WORDS - 1]
    text = " ".join(f"t{number}" for number in numbers)
    assert tokenizer.encode(text).ids == numbers
    assert tokenizer.decode(numbers) == f" {text}"
    assert tokenizer.encode(f"t{NUM_WORDS}").ids[0] > NUM_WORDS, "no word: bytes"
    assert {name: tokenizer.token_to_id(name) for name in NAMES.values()} == {name: i for i, name in NAMES.items()}


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(["t1", " ", "t20", "<stop>", "x", "\n"])).map("".join))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    back = tokenizer.decode(ids, skip_special_tokens=False)
    assert back == text or back.replace(" t", "t") == text.replace(" t", "t")


def test_a_bad_answer_can_be_seen(tokenizer: Tokenizer) -> None:
    table = TokenTable(tokenizer)
    assert table.is_byte_level
    piece = table.new()
    assert piece.feed([5, BAD, END, 6]) + piece.flush() == " t5<bad> t6"


def test_a_chat_is_written_with_its_marks(folder: ModelFolder) -> None:
    renderer = Renderer.load(folder.path, folder.facts.chat_template)
    text = renderer.chat_text([said("user", "t1 t2 <stop> t3")])
    ids = renderer.tokenizer.encode(text, add_special_tokens=False).ids
    renderer.close()
    assert [token for token in ids if token < NUM_WORDS or token > END] == [USER, 1, 2, STOP, 3, ASSISTANT]
    assert ids[-2:] == [END, ASSISTANT]


def test_the_files_are_written_once_and_mended(tmp_path: Path) -> None:
    file = resolve("echo", tmp_path).path / "tokenizer.json"
    written = file.stat().st_mtime_ns, file.read_bytes()
    assert resolve("echo", tmp_path).path == file.parent
    assert file.stat().st_mtime_ns == written[0]
    file.write_bytes(written[1][:100])
    threads = [threading.Thread(target=resolve, args=("echo", tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_bytes() == written[1]
    assert sorted(path.name for path in file.parent.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(StartupError, match="cache_dir"):
        resolve("echo", tmp_path)


def test_its_keys_are_refused_for_other_models_and_out_of_range() -> None:
    assert load_config(model="echo").models["echo"].source == "echo"
    keys = "models.x.source=echo", "models.x.echo={layers: 3, step_s: 0.5}"
    assert load_config(overrides=keys).models["x"].echo.layers == 3
    with pytest.raises(StartupError, match="these keys are for the model echo"):
        load_config(overrides=["models.x.echo.layers=3"])
    for wrong in ("head_dim=6", "layers=0", "step_s=-1", "step_s=.inf", "token_s=.nan", "colour=1"):
        with pytest.raises(StartupError, match="echo"):
            load_config(overrides=["models.x.source=echo", f"models.x.echo.{wrong}"])
