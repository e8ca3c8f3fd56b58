"""Which models are the same: whatever their names are, and never where an answer could be another one.

Guards against a broken stream that nobody goes on with beside a pool of the same weights, and one that another model
ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.config import ModelSettings
from diptych.cluster.models import resolve
from diptych.cluster.models.identity import weights_id
from diptych.protos.echo import ECHO


def identity(folder: Path, **settings: object) -> str:
    given = ModelSettings.model_validate({"source": str(folder), **settings})
    found = resolve(str(folder), folder / "cache", has_weights=given.has_weights)
    return weights_id(found, computed=given.computed, has_weights=given.has_weights)


def test_the_same_folder_is_the_same_model_however_it_is_named_sized_or_laid_out(folder: Path) -> None:
    first = identity(folder)
    assert first.startswith("w_")
    assert identity(folder, layout="colocated", decode={"engines": 3}, max_context_tokens=32, seed=7) == first
    link = folder.parent / "other-name"
    link.symlink_to(folder)
    assert identity(link) == first


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"device": "cpu"},
        {"weights": "random"},
        {"reasoning_format": "none"},
    ],
)
def test_what_is_computed_otherwise_is_another_model(folder: Path, settings: dict[str, object]) -> None:
    assert identity(folder, **settings) != identity(folder)
    assert identity(folder, **settings) == identity(folder, **settings)


def _append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _append(folder / "tokenizer.json"),
        lambda folder: _append(folder / "config.json"),
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": 0.3}'),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model2.safetensors"),
    ],
)
def test_whatever_an_answer_depends_on_tells_models_apart(folder: Path, change: Callable[[Path], object]) -> None:
    before = identity(folder)
    change(folder)
    assert identity(folder) != before


def test_other_weights_of_the_same_size_and_place_are_other_ones(folder: Path) -> None:
    """A checkpoint of a later step has the same shapes."""
    before, file = identity(folder), folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    later = folder / "later"
    later.write_bytes(data)
    later.replace(file)
    assert identity(folder) != before


def test_what_cannot_be_looked_at_is_equal_to_nothing(folder: Path) -> None:
    found = resolve(str(folder), folder / "cache")
    gone = replace(found, path=folder / "model.safetensors" / "x")
    (broken := folder / "x").mkdir()
    (broken / "config.json").mkdir()
    assert weights_id(replace(found, path=broken), computed=()) == ""
    assert weights_id(gone, computed=()) == ""


def test_the_echo_is_the_same_in_every_pool(tmp_path: Path) -> None:
    first, second = (weights_id(resolve(ECHO, tmp_path), computed=()) for _ in range(2))
    assert first == second != ""
