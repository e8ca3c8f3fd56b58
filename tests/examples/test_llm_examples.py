"""Every script of examples/llm runs, against the answers that it brings itself. tests/e2e runs them against a cluster.

Guards against an example that has fallen behind the library, prints nothing, or says something that no model keeps to.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from diptych.agents.llm import Registry, registry
from diptych.agents.llm.testing import ScriptedModel, forbid_network

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "llm"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
MODEL = "pool/smollm2-135m-instruct"
MOST_LINES = 60


def name_of(script: Path) -> str:
    return str(script.relative_to(EXAMPLES))


def loaded(script: Path) -> ModuleType:
    """Under a name of its own: pickles and dataclasses look their module up."""
    name = f"example_{script.stem}_{uuid.uuid4().hex[:8]}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def lacking(script: Path) -> list[str]:
    """Packages that it shows and that this environment has not: `make test` goes without other makers' clients."""
    nodes = list(ast.walk(ast.parse(script.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    tops = {name.partition(".")[0] for name in names}
    return sorted(top for top in tops if top and importlib.util.find_spec(top) is None)


@pytest.fixture
def as_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The process's own registry is new, the folder empty, and the model is told as to everybody."""
    monkeypatch.setattr(sys, "argv", ["example.py"])
    monkeypatch.setenv("DIPTYCH_MODEL", MODEL)
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield monkeypatch
    for name in set(sys.modules) - known:
        if name.startswith("example_"):
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_an_example_runs_with_the_answers_that_it_brings(
    script: Path, as_program: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing := lacking(script):
        pytest.skip(f"needs {', '.join(missing)}")
    own = Registry(environ={})
    as_program.setattr(registry, "_default", own)
    model = ScriptedModel([])
    own.add("pool", model)
    with forbid_network():
        module = loaded(script)
        model._left = list(module.SCRIPT)
        assert module.main() is None
    assert capsys.readouterr().out.strip(), "it shows nothing"
    assert model.left == 0, f"{model.left} entries of SCRIPT were not asked for"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_an_example_says_what_it_shows_and_is_short(script: Path) -> None:
    tree = ast.parse(script.read_text())
    assert ast.get_docstring(tree), "it does not say what it shows"
    assert len(script.read_text().splitlines()) <= MOST_LINES
    names = {target.id for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)
             for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
             if isinstance(target, ast.Name)}  # fmt: skip
    assert "SCRIPT" in names
    assert any(isinstance(node, ast.If) for node in tree.body), 'it does not run: if __name__ == "__main__": main()'
