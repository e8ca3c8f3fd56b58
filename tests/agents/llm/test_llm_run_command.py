"""`diptych run` gives a function what the command line says, prints the answer alone, and tells mistakes in a sentence.

Guards against arguments that arrive as texts where numbers were meant, tracebacks in place of sentences, exit codes
that hide a failure, and words on stdout that are no part of the answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diptych.agents.llm import Registry, registry
from diptych.agents.llm.command import run
from diptych.agents.llm.testing import EchoModel, Said, ScriptedModel, cut
from diptych.cluster.cli import app

PROGRAM = """
import asyncio
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from diptych import llm


class Tone(Enum):
    DRY = "dry"


class Book(BaseModel):
    title: str
    year: int


@dataclass
class Place:
    name: str
    height: float = 0.0


@llm.call("pool/m")
def ask(question: str, times: int = 1) -> str:
    return f"{question}|{times!r}"


@llm.call("pool/m", output=Book, retries=llm.Retries(attempts=2, base_s=0.0))
async def book(about: str) -> str:
    await asyncio.sleep(0)
    return about


@llm.call("pool/m")
def typed(
    a: int, b: float, c: bool, d: date, e: Tone, f: Literal["x", "1"], g: list[int], h: dict[str, int], i: str | None,
    j: Place, k: str | int, l: Annotated[int, Field(ge=3)], m: int | None, n=None, *, o: tuple[str, ...] = (),
) -> str:
    return repr((a, b, c, d, e, f, g, h, i, j, k, l, m, n, o))


@llm.call("pool/m")
def injected(question: str, ctx: llm.Context[None]) -> str:
    return f"{question} {type(ctx).__name__}"


@llm.call("pool/m")
def anything(**names: int) -> str:
    return repr(names)


@llm.prompt
def words(about: str) -> str:
    return f"words about {about}"


agent = llm.Agent("pool/m", name="clerk", instructions="Be kind.")


def twice(question: str) -> list[str]:
    return [ask(question).text, ask(question).text]


async def later(question: str) -> str:
    return (await ask.aio(question)).text


def counted(most: int):
    yield from ({"number": at} for at in range(most))


def broken(by: int) -> float:
    return 1 / by


def flags(loud: bool, no_end: bool = True) -> list[bool]:
    return [loud, no_end]


def hidden(thing: llm.Stream[str]) -> None: ...


def of_book(book: Book) -> str:
    return book.title


def clash(model: str, stream: int) -> str:
    return f"{model} {stream!r}"


def silent() -> None:
    ask("nobody hears")


NUMBER = 7
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    known = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_default", Registry(environ={}))
    file = tmp_path / "program_of_a_test.py"
    file.write_text(PROGRAM)
    yield str(file)
    for name in set(sys.modules) - set(known):
        if name.startswith("program_of"):
            del sys.modules[name]


def answering(*entries: Any, then: Any = None) -> ScriptedModel:
    model = EchoModel() if not entries and then is None else ScriptedModel(entries, then=then)
    registry.default_registry().add("pool", model)
    return model


def test_a_text_is_printed_as_it_is(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering()
    assert run(f"{program}:ask", ["--question", "what?", "--times=3"]) == 0
    assert capsys.readouterr() == ("what?|3\n", "")
    assert run(f"{program}:ask", named=["question=a=b", "times=2"]) == 0
    assert capsys.readouterr().out == "a=b|2\n"


def test_arguments_arrive_as_what_the_hints_say(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering()
    given = (
        "--a 7 --b 7 --c --d 2026-11-23 --e dry --f 1 --g 1 --g 2 "
        '--h {"x":1} --i null --k 7 --l 3 --m null --n 7 --o a'
    ).split()  # fmt: skip
    assert run(f"{program}:typed", [*given, "--j", '{"name": "Rigi"}']) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == (
        "(7, 7.0, True, datetime.date(2026, 11, 23), <Tone.DRY: 'dry'>, '1', [1, 2], {'x': 1}, 'null', "
        "Place(name='Rigi', height=0.0), '7', 3, None, '7', ('a',))\n"
    )
    assert run(f"{program}:anything", ["--x", "1", "--y=2"]) == 0
    assert capsys.readouterr().out == "{'x': 1, 'y': 2}\n"
    assert run(f"{program}:injected", ["--question", "who?"]) == 0
    assert capsys.readouterr().out == "who? Context\n"


def test_a_flag_may_be_off(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given, out in (
        (["--no-loud", "--no-end"], [False, True]),
        (["--loud", "false", "--no-end=no"], [False, False]),
        (["--no-no-end", "--loud"], [True, False]),
    ):
        assert run(f"{program}:flags", given) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out) == out


def test_a_typed_value_is_printed_as_json(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering({"title": "\u00c9mile", "year": 1762}, "no book", {"title": "Emma", "year": 1815})
    assert run(f"{program}:book", ["--about", "a book"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"title": "\u00c9mile", "year": 1762}
    assert "\u00c9mile" in out
    assert run(f"{program}:book", ["--about", "a book"], as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["value"] == {"title": "Emma", "year": 1815}
    assert [one["why"] for one in told["attempts"]] == ["first", "reask"]
    assert told["spent"]["requests"] == 2
    assert told["model"] == "pool/m"
    assert told["attempts"][0]["error"]["message"].startswith("the answer is no Book")
    assert told["attempts"][1]["error"] is None


def test_a_stream_is_printed_as_it_comes(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering(cut("xy", after=2), Said(text="one two", pieces=("one ", "two")), Said(text="yes", thoughts="hm"))
    assert run(f"{program}:ask", ["--question", "q"], stream=True) == 0
    out, err = capsys.readouterr()
    assert out == "xy\none two\n"
    assert "ask begins anew (retry): " in err
    assert run(f"{program}:agent", ["--prompt", "q"], stream=True) == 0
    assert capsys.readouterr().out == "yes\n"


def test_agents_prompts_and_plain_functions_run_too(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = answering()
    for function, given, out in (
        ("agent", ["--prompt", "hello"], "hello\n"),
        ("twice", ["--question", "a"], '[\n  "a|1",\n  "a|1"\n]\n'),
        ("later", ["--question", "a"], "a|1\n"),
        ("counted", ["--most", "2"], '{"number":0}\n{"number":1}\n'),
        ("silent", [], ""),
    ):
        assert run(f"{program}:{function}", given) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == out
    assert run(f"{program}:words", ["--about", "rain"], model="pool/other") == 0
    assert capsys.readouterr().out == "words about rain\n"
    assert run(f"{program}:twice", ["--question", "a"], model="pool/another") == 0
    assert [body["model"] for body in model.requests[-3:]] == ["other", "another", "another"]


@pytest.mark.parametrize(
    ("target", "given", "words"),
    [
        ("none.py:ask", [], "the file 'none.py' is not there: write FILE:FUNCTION"),
        ("/:ask", [], "the file '/' is a folder"),
        ("{}", [], "say which function of {}: write {}:FUNCTION; there are: ask, "),
        ("{}:aks", [], "has no 'aks': did you mean ask? there are: ask, book, typed, injected, anything, words, agent"),
        ("{}:NUMBER", [], "NUMBER is of the type int, neither a call nor an agent nor a function"),
        ("{}:Book", [], "Book is a class, neither"),
        ("{}:ask", [], "ask: missing --question (text)"),
        ("{}:typed", ["--a", "1"], "typed: missing --b (float), --c (bool), --d (datetime.date), "),
        ("{}:ask", ["--question"], "--question needs a value (text)"),
        ("{}:ask", ["--question", "--times", "1"], "--question needs a value (text)"),
        ("{}:ask", ["--question", "q", "--time", "1"], "no parameter 'time': did you mean --times?"),
        ("{}:ask", ["--question", "q", "--x", "1"], "no parameter 'x': it takes --question, --times"),
        ("{}:ask", ["--question", "q", "--no-times"], "no parameter 'no-times'"),
        ("{}:ask", ["what?"], "'what?' belongs to no parameter: write --NAME VALUE"),
        ("{}:ask", ["--question", "q", "--times", "two"], "ask: --times 'two' is no int: "),
        ("{}:ask", ["--question", "q", "--times", "1", "--times", "2"], "--times is given 2 times, and all of them "),
        ("{}:hidden", ["--thing", "1"], "which no text on a command line can be"),
        ("{}:of_book", ["--book", '{"title": "Emma", "year": "MDCCCXV"}'], "is no program_of_a_test.Book: /year: "),
        ("{}:of_book", ["--book", '{"title": "Emma"'], "this is no JSON: EOF"),
        ("{}:of_book", ["--book", "Emma"], "--book 'Emma' is no program_of_a_test.Book: Input should be"),
        ("{}:clash", [], "clash: missing --arg model=... (text), --arg stream=... (int)"),
        ("{}:words", ["--about", "q"], "words is a prompt without a model: add --model"),
        ("{}:agent", [], "agent: missing --prompt (text)"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(
    target: str, given: list[str], words: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = answering()
    assert run(target.format(program), given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diptych: ")
    assert words.replace("{}", program) in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert model.requests == []


def test_what_a_file_raises_where_it_is_loaded_is_told_with_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for text, words in (
        ("x = 1\ny = 1 / 0\n", "program_of_b.py:2: ZeroDivisionError"),
        ("def f(:\n", "program_of_b.py:1: this is no Python: invalid syntax"),
        ("import not_there_at_all\n", "program_of_b.py:1: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "program_of_b.py:1: the file ends the program"),
        ("x = 1\n", "has no 'f': it has none"),
    ):
        file = tmp_path / "program_of_b.py"
        file.write_text(text)
        assert run(f"{file}:f") == 2
        assert words in capsys.readouterr().err


def test_a_failed_call_tells_of_its_attempts_and_ends_with_1(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering("no book", "no book either")
    assert run(f"{program}:book", ["--about", "a"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diptych: the answer is no Book:\n")
    assert "\n1. first at pool/m, " in err
    assert "\n2. reask at pool/m, " in err
    assert run(f"{program}:ask", ["--question", "q"], model="nobody/m") == 1
    assert "there is no provider 'nobody'" in capsys.readouterr().err
    assert run(f"{program}:broken", ["--by", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "    return 1 / by\n" in err
    assert err.endswith(":broken raised ZeroDivisionError: division by zero\n")
    assert "agents/llm" not in err
    assert run(f"{program}:broken", ["--by", "1"], stream=True) == 2
    assert run(f"{program}:ask", ["--question", "q"], stream=True, as_json=True) == 2


def test_the_command_passes_everything_on(program: str) -> None:
    answering()
    runner = CliRunner()
    done = runner.invoke(app, ["run", f"{program}:ask", "--question", "hi", "--arg", "times=2", "--model", "pool/x"])
    assert (done.exit_code, done.stdout) == (0, "hi|2\n")
    assert runner.invoke(app, ["run", f"{program}:ask"]).exit_code == 2
    assert runner.invoke(app, ["run"]).exit_code == 2


def test_it_starts_without_torch_and_ray(program: str) -> None:
    """As a process: the answer to a mistake comes soon, and a reader that leaves does no harm."""
    code = (
        "import sys; from diptych.cluster.cli import app; sys.argv = ['diptych', 'run', sys.argv[1], *sys.argv[2:]]\n"
        "try: app()\n"
        "finally: assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"{program}:ask"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "diptych: ask: missing --question (text)\n")
    shell = f"{sys.executable} -c '{code.replace(chr(39), chr(34))}' {program}:counted --most 100000 | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('{"number":0}\n', "")
