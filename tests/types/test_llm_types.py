"""The types of `diptych.llm`, as mypy and pyright read them: the files beside this one.

`right_*.py` assert what each expression's type is, `wrong_*.py` hold uses that must be refused, each line with the
names of the expected errors. An error that is lost is one itself, because both checkers refuse a comment that ignores
nothing: guards against types that got wider unnoticed (an Any in an overload, a lost ParamSpec).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES = sorted((ROOT / "examples/llm").rglob("*.py"))
FILES = sorted(HERE.glob("right_*.py")) + sorted(HERE.glob("wrong_*.py"))
if importlib.util.find_spec("anthropic"):
    FILES.append(HERE / "anthropic_clients.py")
else:  # a client that `make test` goes without
    EXAMPLES.remove(ROOT / "examples/llm/wrap_anthropic.py")

# Of each line one error, and no other: what shows that a checker has read the files, and knows of what we make.
PLANTED = """\
from diptych import llm

@llm.call("pool/m")
def asked(topic: str) -> str:
    return topic

number: int = asked("x").value
text: str = asked("x").value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    assert (ROOT / "build/ns/diptych/llm").exists(), "make links: type checkers find the package there"
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    return file


def ran(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    words = [str(one) for one in command]
    return subprocess.run(words, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=280)


def test_mypy_agrees_with_every_line_and_the_examples(planted: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--no-color-output", "--no-error-summary", "--hide-error-context"]
    found = ran(*command, *FILES, *EXAMPLES, planted, MYPYPATH="build/ns")
    lines = [line for line in found.stdout.splitlines() if ": error: " in line and not line.startswith("build/ns/")]
    ours = [line.partition("planted.py:")[2] for line in lines if "planted.py:" in line]
    assert [line for line in lines if "planted.py:" not in line] == [], found.stdout + found.stderr
    assert [line.partition(":")[0] for line in ours] == ["7", "8"], found.stdout + found.stderr
    assert "[assignment]" in ours[0]
    assert "[unused-ignore]" in ours[1]


def test_pyright_agrees_with_every_line(planted: Path, tmp_path: Path) -> None:
    settings = {"extends": os.fspath(HERE / "pyrightconfig.json"), "include": [str(one) for one in (*FILES, planted)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    found = ran(*command, "--project", tmp_path)
    told = json.loads(found.stdout)
    assert told["summary"]["filesAnalyzed"] == len(FILES) + 1, found.stderr
    errors = [
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1, one.get("rule"), one["message"])
        for one in told["generalDiagnostics"]
    ]
    assert [one for one in errors if one[0] != "planted.py"] == []
    rules = ["reportAssignmentType", "reportUnnecessaryTypeIgnoreComment"]
    assert [one[1:3] for one in errors] == list(zip((7, 8), rules, strict=True))
