"""A start that cannot succeed ends with exit code 1 and one sentence that says what to do; nothing is left behind."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.cluster.config import DEFAULT_MODEL, default_cache_dir
from diptych.cluster.control import cards
from diptych.cluster.models import resolve
from diptych.kernels.testing import make_tiny_checkpoint

DIPTYCH = Path(sys.executable).with_name("diptych")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path("/tmp") / f"diptych-{uuid.uuid4().hex[:8]}"  # pytest's folders are too long for sockets
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def survivors(token: str) -> list[str]:
    """Command lines of processes that carry `token` in their environment: all that a start made."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in environ.read_bytes():
                found.append(environ.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it is gone, or not ours
    return found


def refusal(run_dir: Path, *options: str) -> str:
    """The sentence, without the command's name; checks everything that all failed starts share."""
    token = uuid.uuid4().hex
    done = subprocess.run(
        [str(DIPTYCH), "serve", "--set", f"run_dir={run_dir}", *options],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        cwd="/",
        env=os.environ | {"DIPTYCH_TEST_TOKEN": token},
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("diptych: ")
    assert survivors(token) == []
    assert not run_dir.exists() or list(run_dir.iterdir()) == []
    return sentence.removeprefix("diptych: ")


def test_a_port_in_use(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refusal(run_dir, "--port", str(port))
    assert f"port {port} " in sentence
    assert "in use" in sentence
    assert "--port" in sentence


def test_an_unknown_configuration_key(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "diptych.yaml"
    file.write_text("router: {prot: 8001}\n")
    assert "router.prot is not a known key (did you mean port?)" in refusal(run_dir, "--config", str(file))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models:\n  a: {}\n  a: {}\n", "the key a appears twice"),
        (
            "models: {a: {prefill: {engines: 0}}}",
            "models.a.prefill.engines: should be greater than or equal to 1, not 0",
        ),
        ("models: {a: {decode: {engines: 0}}}", "models.a.decode.engines: should be greater than or equal to 1, not 0"),
        (
            "models: {a: {layout: colocated, prefill: {step_tokens: 64}}}",
            "models.a.prefill: the layout colocated has no prefill pool",
        ),
        ("models: {a: {prefill: {dtype: float32}}}", "models.a.prefill.dtype is not a known key"),
        ("models: {a: {decode: {kv: {block_token: 8}}}}", "models.a.decode.kv.block_token is not a known key"),
    ],
)
def test_pools_that_cannot_be(run_dir: Path, tmp_path: Path, text: str, sentence: str) -> None:
    """Two models of one name, an empty pool, a layout that does not fit, engines of a pair that would not match."""
    file = tmp_path / "diptych.yaml"
    file.write_text(text)
    assert sentence in refusal(run_dir, "--config", str(file))


def test_of_several_models_the_one_that_does_not_fit_is_named(run_dir: Path) -> None:
    sentence = refusal(
        *(run_dir, "--port", "0", "--set", f"models.big.source={DEFAULT_MODEL}"),
        *("--set", "models.big.decode.kv.memory_mib=100000000"),
    )
    assert "lower models.big.decode.kv.memory_mib" in sentence
    assert "100000" in sentence


def test_a_configuration_file_that_is_not_there(run_dir: Path) -> None:
    assert "/no/such.yaml" in refusal(run_dir, "--config", "/no/such.yaml")


def test_an_unknown_model_names_the_known_ones(run_dir: Path) -> None:
    sentence = refusal(run_dir, "--port", "0", "--model", "gpt-99")
    assert "gpt-99" in sentence
    assert DEFAULT_MODEL in sentence


def test_too_little_memory_tells_the_numbers_and_what_to_lower(run_dir: Path) -> None:
    sentence = refusal(run_dir, "--port", "0", "--set", f"models.{DEFAULT_MODEL}.kv.memory_mib=100000000")
    assert "not enough memory" in sentence
    assert f"lower models.{DEFAULT_MODEL}.kv.memory_mib" in sentence


@pytest.mark.skipif(cards.installed().count > 0, reason="of machines without a card")
@pytest.mark.parametrize("key", ["device=cuda", "deterministic=true"])
def test_what_needs_a_card_is_refused_without_one(run_dir: Path, key: str) -> None:
    sentence = refusal(run_dir, "--port", "0", "--set", f"models.{DEFAULT_MODEL}.{key}")
    assert f"models.{DEFAULT_MODEL}.{key.partition('=')[0]}" in sentence
    assert "card" in sentence


def test_a_cache_that_cannot_be_written(run_dir: Path) -> None:
    assert "cache_dir" in refusal(run_dir, "--port", "0", "--set", "cache_dir=/proc/none")


def test_pickled_weights_are_refused_by_name(run_dir: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))
    sentence = refusal(run_dir, "--port", "0", "--model", str(folder))
    assert "safetensors" in sentence


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_a_truncated_weights_file(run_dir: Path, tmp_path: Path, keep: int) -> None:
    file = tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refusal(run_dir, "--port", "0", "--model", str(file.parent))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": ["Nothing"], "model_type": "nothing"}'])
def test_a_broken_config(run_dir: Path, tmp_path: Path, text: str) -> None:
    folder = tiny_model(tmp_path)
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(run_dir, "--port", "0", "--model", str(folder))


def test_a_model_without_a_tokenizer(run_dir: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(run_dir, "--port", "0", "--model", str(folder))


@pytest.mark.ray
@pytest.mark.slow
def test_a_tokenizer_that_is_broken_ends_what_was_already_started(run_dir: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refusal(run_dir, "--port", "0", "--model", str(folder))


@pytest.mark.ray
@pytest.mark.slow
def test_a_router_that_cannot_be_made_says_why(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own words are that an update of the deployment failed."""
    (tmp_path / "cryptography").mkdir()
    (tmp_path / "cryptography" / "__init__.py").write_text("raise ModuleNotFoundError('there is no cryptography')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sentence = refusal(run_dir, "--model", "echo", "--port", "0")
    assert sentence == "the router did not start: ModuleNotFoundError: there is no cryptography"


def tiny_model(folder: Path) -> Path:
    """A random llama with the default model's tokenizer."""
    known = resolve(DEFAULT_MODEL, default_cache_dir()).path
    made = make_tiny_checkpoint(folder / "tiny", vocab_size=49152)
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        if (known / name).exists():
            shutil.copy(known / name, made / name)
    return made
