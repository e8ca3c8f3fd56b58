"""`diptych.llm` is `diptych.agents.llm` under its public name: one set of objects, soon loaded, without torch and ray.

Guards against a second copy of a module, whose classes no `except` of the first would catch; against a name that is in
one and not in the other; against an import that loads the engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
MOST_MODULES = 450  # bench/llm_overhead.py holds the time that they take
MOST_RSS_MB = 60
HEAVY = "torch ray transformers openai anthropic mcp jinja2 opentelemetry.sdk instructor numpy".split()

LOOK = """
import json, sys
from diptych import llm
peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
loaded = sorted(sys.modules)
import diptych.agents.llm as inner
import diptych.llm.testing, diptych.agents.llm.testing as inner_testing
pairs = [(llm, inner), (llm.testing, inner_testing)]
print(json.dumps({
    "rss_mb": int(peak.split()[1]) / 1024,
    "loaded": loaded,
    "published": sorted(name for name in sys.modules if name.startswith("diptych.llm")),
    "other": [name for outer, one in pairs for name in one.__all__ if getattr(outer, name) is not getattr(one, name)],
    "lists": [sorted(outer.__all__) == sorted(one.__all__) for outer, one in pairs],
    "twice": sorted({
        name for name, module in list(sys.modules.items())
        if name.startswith("diptych.") and getattr(module, "__file__", None)
        and any(other is not module and getattr(other, "__file__", None) == module.__file__
                for other in list(sys.modules.values()))
    }),
    "file": llm.__file__,
}))
"""


def look(*, path: Path | None = None) -> dict[str, Any]:
    start = (  # as if this checkout were not installed
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]; "
        f"sys.path.insert(0, {str(path)!r})\n"
    )
    code = LOOK if path is None else start + LOOK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any]) -> None:
    assert found["other"] == []
    assert found["lists"] == [True, True]
    assert found["twice"] == []
    assert found["published"] == ["diptych.llm", "diptych.llm.testing"]
    assert not {name for name in found["loaded"] if name.startswith(tuple(HEAVY)) and name.split(".")[0] != "diptych"}


def test_every_public_name_is_the_same_object_in_the_checkout() -> None:
    check(look())


def test_the_import_is_small() -> None:
    found = look()
    assert len(found["loaded"]) <= MOST_MODULES
    assert found["rss_mb"] < MOST_RSS_MB


def test_the_packages_have_what_they_list() -> None:
    from diptych.agents import llm
    from diptych.agents.llm import testing

    for package in (llm, testing):
        assert len(package.__all__) == len(set(package.__all__)), "a name stands twice"
        assert [name for name in package.__all__ if not hasattr(package, name)] == []


@pytest.mark.slow
def test_every_public_name_is_the_same_object_in_the_wheel(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)],
        check=True,
        timeout=600,
    )
    (wheel,) = tmp_path.glob("diptych-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(installed)
    found = look(path=installed)
    assert found["file"] == str(installed / "diptych" / "llm" / "__init__.py")
    check(found)
    program = tmp_path / "program.py"
    program.write_text(
        "from typing import assert_type\n"
        "from diptych import llm\n"
        "from diptych.llm.testing import ScriptedModel\n"
        "@llm.call('pool/m', output=int)\n"
        "def f(x: str) -> str:\n"
        "    return x\n"
        "assert_type(f('x').value, int)\n"
        "assert_type(ScriptedModel(['a']).left, int)\n"
        "f(1)  # type: ignore[arg-type]\n"
    )
    typed = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(tmp_path / "cache"),
         "--namespace-packages", "--follow-imports", "silent", str(program)],
        capture_output=True, text=True, cwd=installed, timeout=600,
    )  # fmt: skip
    assert typed.returncode == 0, typed.stdout
