"""Hub names without a network: huggingface_hub's two calls are replaced, its cache is a folder made here."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from diptych.cluster.models import resolve
from diptych.protos.errors import StartupError

NAME = "some-org/tiny"
COMMIT = "0" * 39 + "1"


@dataclass
class Sibling:
    rfilename: str
    size: int | None = 1_000_000


@dataclass
class Hub:
    """Stands for HfApi.model_info and snapshot_download of a hub that can be reached."""

    folder: Path
    files: list[str]
    error: Exception | None = None
    download_error: Exception | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def model_info(self, name: str, *, files_metadata: bool) -> Any:
        assert files_metadata
        if self.error is not None:
            raise self.error
        return type("Info", (), {"sha": COMMIT, "siblings": [Sibling(file) for file in self.files]})()

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked.append({"name": name, **options})
        if self.download_error is not None:
            raise self.download_error
        return str(self.folder)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(folder, ["config.json", "model.safetensors", "tokenizer.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def refusal(status: int, cls: type[Exception]) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("GET", "http://hub.invalid"))
    return cls("refused", response=response)  # type: ignore[call-arg]


def prepare_cache(root: Path, folder: Path) -> None:
    """What a download leaves: refs/main names the commit, snapshots/<commit> holds the files."""
    repository = root / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)


def test_weights_texts_and_templates_are_fetched_and_nothing_that_could_run(hub: Hub, tmp_path: Path) -> None:
    hub.files += [
        "pytorch_model.bin",
        "modeling_tiny.py",
        "onnx/model.json",
        "consolidated.safetensors",
        "chat_template.jinja",
        "README.md",
        "training_args.pt",
    ]
    told: list[str] = []
    found = resolve(NAME, tmp_path / "cache", told.append)
    assert found.path == hub.folder
    assert found.facts.name == NAME
    (asked,) = hub.asked
    assert (asked["name"], asked["revision"]) == (NAME, COMMIT)
    assert asked["allow_patterns"] == ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    assert told == [f"fetching {NAME} from the hub: 4 MB, less what the cache holds"]


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(StartupError, match=r"some-org/tiny holds no \*\.safetensors on the hub"):
        resolve(NAME, tmp_path)
    assert hub.asked == []


def test_code_in_what_came_is_refused_as_in_any_folder(hub: Hub, tmp_path: Path) -> None:
    config = hub.folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {}, ', 1))
    with pytest.raises(StartupError, match="auto_map"):
        resolve(NAME, tmp_path)


@pytest.mark.parametrize(
    ("status", "cls", "sentence"),
    [
        (404, RepositoryNotFoundError, "There is no some-org/tiny on the hub"),
        (403, GatedRepoError, "some-org/tiny is gated: accept its terms"),
    ],
)
def test_a_hub_that_says_no_is_quoted_with_the_alternatives(
    hub: Hub, tmp_path: Path, status: int, cls: type[Exception], sentence: str
) -> None:
    hub.error = refusal(status, cls)
    with pytest.raises(StartupError, match=sentence) as caught:
        resolve(NAME, tmp_path)
    assert "smollm2-135m-instruct" in str(caught.value)


def test_a_download_that_breaks_says_that_it_can_be_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    hub.download_error = httpx2.ReadTimeout("the line went dead")
    with pytest.raises(StartupError, match=r"the line went dead.*start again"):
        resolve(NAME, tmp_path)


def test_a_fault_of_ours_is_not_called_a_network_failure(hub: Hub, tmp_path: Path) -> None:
    hub.error = KeyError("ours")
    with pytest.raises(KeyError):
        resolve(NAME, tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_the_cached_snapshot_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    root = tmp_path / "hub"
    prepare_cache(root, folder)
    unreachable = Hub(folder, [], error=httpx2.ConnectError("no route to the hub"))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=root, **k))
    found = resolve(NAME, tmp_path / "cache")
    assert found.path == root / "models--some-org--tiny" / "snapshots" / COMMIT
    assert found.facts.layers == 1


@pytest.mark.parametrize(("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, "no route to the hub")])
def test_without_a_hub_and_a_cache_the_alternatives_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, why: str
) -> None:
    unreachable = Hub(folder, [], error=httpx2.ConnectError("no route to the hub"))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path, **k))
    with pytest.raises(StartupError) as caught:
        resolve(NAME, tmp_path / "cache")
    for words in (why, "does not hold it", "smollm2-135m-instruct", "folder with config.json", ".gguf", "cache"):
        assert words in str(caught.value)
