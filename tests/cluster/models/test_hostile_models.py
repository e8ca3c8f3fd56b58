"""A hostile model is refused with a reason before anything starts: nothing of it runs, and it costs next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_models
import pytest
from hostile_models import CANARY, CASES, WALK, folder, template

from diptych.cluster.api.template import compile_template
from diptych.cluster.models import resolve
from diptych.cluster.models.trial import check_template
from diptych.protos.errors import StartupError

MOST_BYTES = 64 << 20
MOST_CPU_S = 2.0  # 1 s for a template, the rest for the start of its process
FINE = [
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{{ raise_exception('tools only') }}",
    "{% set x = strftime_now('%d') %}{{ bos_token }}{{ x }}{{ tools[0].function.name }}",
]


@pytest.fixture(scope="module", params=[(), ("-O",)], ids=["", "-O"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each, in one process: with assertions, and without."""
    root = tmp_path_factory.mktemp("hostile")
    made = {name: write(root / f"m{at}") for at, (name, (write, _)) in enumerate(CASES.items())}
    for path in made.values():
        files = [path] if path.is_file() else list(path.iterdir())
        assert sum(file.stat().st_size for file in files) <= 64 << 10
    (root / "cases.json").write_text(json.dumps({name: str(path) for name, path in made.items()}))
    command = [sys.executable, *request.param, "-W", "error", hostile_models.__file__, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert not (root / CANARY).exists()
    assert not list((root / "cache").glob("models/[!.]*"))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}


def test_there_are_twenty_or_more_and_each_was_tried(told: dict[str, dict[str, Any]]) -> None:
    assert told.keys() == CASES.keys()
    assert len(CASES) >= 20


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_its_reason_and_takes_little(told: dict[str, dict[str, Any]], name: str) -> None:
    line = told[name]
    assert CASES[name][1] in line["why"], line
    assert line["why"].endswith(".")
    assert line["bytes"] <= MOST_BYTES, line
    assert line["cpu_s"] <= MOST_CPU_S, line


def test_the_model_that_they_are_made_of_is_taken(tmp_path: Path) -> None:
    """Or the refusals would be for another reason."""
    assert resolve(str(folder(tmp_path / "m")), tmp_path).facts.layers == 1
    fine = template("{% for m in messages %}{{ m['content'] }}{% endfor %}")(tmp_path / "t")
    assert resolve(str(fine), tmp_path).facts.chat_template is not None


@pytest.mark.parametrize("source", FINE)
def test_a_template_that_only_dislikes_our_conversation_is_none_of_them(source: str) -> None:
    check_template(source)


def test_the_router_compiles_no_template_that_names_python_s_inside() -> None:
    """Also one that reached it some other way."""
    with pytest.raises(StartupError, match="inner attribute of Python"):
        compile_template(WALK)


def test_a_trial_that_cannot_be_held_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.cluster.models.trial.sys.executable", "/bin/false")
    with pytest.raises(StartupError, match="trial of the chat template failed"):
        check_template("{{ 'a template of this test alone' }}")
