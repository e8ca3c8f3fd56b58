"""Guards against versions that stay when the prompt changed, and that change when it stayed: by process, place of the
file, layout, comments or model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from diptych.agents import llm
from diptych.agents.llm.testing.scripted import ScriptedModel

SOURCE = '''
from diptych.agents import llm

RULES = "Be brief."
MARK = "-"
TEMPLATE = llm.Template("SYSTEM: Be brief.\\nUSER: {topic}")

@llm.call("a/b", temperature=0.5, stop=["x", "y"], options={"pool": {"min_p": 0.1, "ignore_eos": True}})
def plain(topic: str, many: int = 3):
    """Doc."""
    # a comment
    listed = [f"{MARK} {one}" for one in topic]
    return f"{RULES} {topic!r:>{many}} {listed}" if topic in {"tea", "milk", "rum"} else [llm.system(RULES), "y"]

@llm.prompt(template=TEMPLATE)
def filled(topic: str): ...

@llm.prompt
def naming(topic: str):
    return TEMPLATE(topic=topic)

anonymous = llm.prompt(lambda topic: topic + "!" if topic in {"tea", "milk", "rum"} else RULES)
'''
NAMES = ("plain", "filled", "naming", "anonymous")


def versions_of(folder: Path, name: str, source: str) -> dict[str, str]:
    """Of a module `name` of this source, in this process."""
    import importlib.util

    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {one: getattr(module, one).version for one in NAMES}


def test_versions_are_the_same_in_every_process_and_place(tmp_path: Path) -> None:
    here = versions_of(tmp_path, "first", SOURCE)
    assert len(set(here.values())) == len(NAMES)
    assert all(len(one) == 12 and int(one, 16) >= 0 for one in here.values())
    moved = tmp_path / "deep" / "down"
    moved.mkdir(parents=True)
    (moved / "other.py").write_text(f"'''Moved.'''\n\n{SOURCE}")
    script = f"import json, other; print(json.dumps({{n: getattr(other, n).version for n in {NAMES!r}}}))"
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=moved, env=environ, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == here


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("    # a comment\n", "", set()),
        ("    # a comment\n", "    # another, (\n\n\n", set()),
        ("topic: str, many: int = 3", "topic: str,\n          many:int=3", set()),
        ('[llm.system(RULES), "y"]', "[llm.system(RULES), 'y']", set()),
        ('"a/b", ', '"c/d", ', set()),
        ('stop=["x", "y"], ', "", {"plain"}),
        ("temperature=0.5", "temperature=0.6", {"plain"}),
        ("temperature=0.5", "temperature=0.5, session='s', timeout=3", set()),
        ('"min_p": 0.1, "ignore_eos": True', '"ignore_eos": True, "min_p": 0.1', set()),
        ('"""Doc."""', '"""Other."""', {"plain"}),
        ("many: int = 3", "many: int = 4", {"plain"}),
        ('RULES = "Be brief."', 'RULES = "Be long."', {"plain", "anonymous"}),
        ('MARK = "-"', 'MARK = "*"', {"plain"}),
        ("SYSTEM: Be brief.", "SYSTEM: Be long.", {"filled", "naming"}),
        ('"!" if', '"?" if', {"anonymous"}),
    ],
)
def test_a_version_changes_with_the_content_alone(tmp_path: Path, old: str, new: str, changed: set[str]) -> None:
    assert old in SOURCE
    before = versions_of(tmp_path, "before", SOURCE)
    after = versions_of(tmp_path, "after", SOURCE.replace(old, new))
    assert {name for name in NAMES if before[name] != after[name]} == changed


class Book(BaseModel):
    title: str


class Longer(BaseModel):
    title: str
    pages: int


def test_a_calls_version_holds_its_type_parameters_and_model() -> None:
    @llm.prompt
    def about(topic: str) -> str:
        return topic

    plain = about.call("a/b")
    assert plain.version == about.call("c/d").version == plain.with_("c/d").version == about.version
    kinds = [about.call("a/b", output=kind).version for kind in (str, int, Book, Longer)]
    assert kinds[0] == plain.version
    assert len(set(kinds)) == 4
    warmer = plain.with_(temperature=1.0)
    assert warmer.version == about.call("x/y", temperature=1.0).version != plain.version
    assert plain.with_(session="a", user="b").version == plain.version


def test_tools_are_content() -> None:
    def weather(city: str) -> str:
        """The weather."""
        return city

    def other(city: str) -> str:
        """The weather, by city."""
        return city

    @llm.prompt
    def about(topic: str) -> str:
        return topic

    found = [about.call("a/b", tools=tools).version for tools in ([], [weather], [other], [weather, other])]
    assert len(set(found)) == 4
    assert about.call("a/b", tools=[weather]).version == found[1]


def test_a_draft_tells_the_version() -> None:
    registry = llm.Registry(environ={})
    registry.add("test", ScriptedModel(["yes"]))

    @llm.call("test/m", registry=registry)
    def ask(topic: str) -> str:
        return topic

    assert ask("tea").draft.version == ask.version


def test_the_source_is_read_where_the_function_is_defined(tmp_path: Path) -> None:
    """A file that is replaced under a running program would give the version of another text."""
    file = tmp_path / "replaced.py"
    text = "from diptych.agents import llm\n@llm.prompt\ndef p(x):\n    return f'one {x}'\n"
    versions = []
    for later in (text, text.replace("one", "two")):
        import importlib.util

        file.write_text(text)
        spec = importlib.util.spec_from_file_location("replaced", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        file.write_text(later)
        versions.append(module.p.version)
    assert versions[0] == versions[1]


def test_functions_without_source_have_versions_by_their_code() -> None:
    def made(text: str) -> Any:
        names: dict[str, Any] = {"llm": llm}
        exec(textwrap.dedent(text), names)
        return names["p"]

    one = made("@llm.prompt\ndef p(x): return f'a {x}' if x in {'b', 'c'} else (lambda: x)()")
    assert (
        one.version == made("\n\n@llm.prompt\ndef p(x): return f'a {x}' if x in {'b', 'c'} else (lambda: x)()").version
    )
    assert one.version != made("@llm.prompt\ndef p(x): return f'd {x}' if x in {'b', 'c'} else (lambda: x)()").version
    assert made("p = llm.prompt(lambda x: x + 'a')").version != made("p = llm.prompt(lambda x: x * 2)").version


def test_prompts_that_name_each_other_have_versions() -> None:
    """A cycle of references must end."""

    @llm.prompt
    def one(n: int) -> object:
        return other(n - 1) if n else "end"

    @llm.prompt
    def other(n: int) -> object:
        return one(n - 1) if n else "end"

    assert one.version != other.version


def test_a_wrapped_function_counts_with_what_wraps_it() -> None:
    import functools

    def loud(function: Any) -> Any:
        @functools.wraps(function)
        def louder(*args: Any) -> str:
            return str(function(*args)).upper()

        return louder

    def soft(topic: str) -> str:
        return topic

    assert llm.prompt(loud(soft)).version != llm.prompt(soft).version


def test_what_is_no_function_has_a_version() -> None:
    class Asks:
        def __call__(self, topic: str) -> str:
            return topic

    assert llm.prompt(Asks()).version == llm.prompt(Asks()).version
    assert llm.prompt(Asks())("a") == (llm.user("a"),)
    assert len(llm.prompt(str.upper).version) == 12


def test_text_over_several_lines_in_an_indented_function_is_read(tmp_path: Path) -> None:
    source = '''
from diptych.agents import llm
class Holder:
    @llm.prompt
    def p(self, x):
        return f"""one
two {x}
"""
class Same(Holder):
    pass
def make():
    @llm.prompt
    def p(self, x):
        # other layout
        return (f"""one
two {x}
""")
    return p
plain = Holder.p
filled = naming = anonymous = make()
'''
    found = versions_of(tmp_path, "indented", source)
    assert found["plain"] == found["filled"]
