"""`diptych batch`: lines of a file become calls, a job is a line that any process understands, results are JSON.

Guards against batches that are paid for with a line that means nothing, mistakes without their line, failed items that
end with 0, jobs that are known to the process alone that made them, and words on stdout that no program can read.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diptych.agents import llm
from diptych.agents.llm import Registry, batch_command, registry
from diptych.agents.llm.testing import ScriptedModel, failure, tool_call
from diptych.cluster.batches.testing import Bench, batch_bench
from diptych.cluster.cli import app

PROGRAM = """
from dataclasses import dataclass
from datetime import date

from diptych import llm
from diptych.agents.llm.testing import ScriptedModel, registry_of


@dataclass
class Book:
    title: str
    year: int


@llm.call("pool/echo", max_tokens=6)
def repeat(text: str, mark: str = "!") -> str:
    return f"{text}{mark}"


@llm.call("pool/m", output=Book)
async def book(about: str, before: date, *, most: int = 3) -> str:
    return f"{about} {before!r} {most!r}"


@llm.call("pool/m")
def two(a: int, b: int) -> str:
    return f"{a} {b}"


@llm.call("pool/m")
def positional(a: int, /, b: int, *, ctx: llm.Context[None]) -> str:
    return f"{a!r} {b!r} {type(ctx).__name__}"


@llm.call("pool/m")
def mixed(ctx: llm.Context[None], a: int, /, b: int = 2, c: int = 3, *, d: int, **others: int) -> str:
    print("looking on")
    return f"{a} {b} {c} {d} {others} {type(ctx).__name__}"


@llm.call("pool/m")
def wrong(number: int) -> str:
    return "number " + number


@llm.call("pool/m")
def anything(**names: int) -> str:
    return repr(names)


@llm.call("pool/m")
def sku(id: int) -> str:
    return f"{id!r}"


@llm.prompt
def words(about: str) -> str:
    return f"words about {about}"


@llm.call("mine/m", registry=registry_of(mine=ScriptedModel(["a", "b"])))
def elsewhere(text: str) -> str:
    return text


agent = llm.Agent("pool/m", name="clerk")


def plain(text: str) -> str:
    return text
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    known = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_default", Registry(environ={}))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "program_of_batches.py"
    file.write_text(PROGRAM)
    yield str(file)
    for name in set(sys.modules) - set(known):
        if name.startswith("program_of"):
            del sys.modules[name]


def answering(*entries: Any) -> ScriptedModel:
    model = ScriptedModel(entries)
    registry.default_registry().add("pool", model)
    return model


def prompts(model: ScriptedModel) -> list[str]:
    return [body["messages"][-1]["content"] for body in model.requests]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def batch(*words: str, stdin: str | None = None) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["batch", *words], input=stdin)
    return done.exit_code, done.stdout, done.stderr


def test_a_job_is_submitted_and_goes_on_by_its_line(program: str) -> None:
    model = answering({"title": "Emma", "year": 1815}, "no book", failure("rate_limited"), tool_call("look"))
    Path("items.jsonl").write_text(
        '\ufeff{"sku": "a", "about": "tea", "before": "1900-01-01"}\n\n'
        '{"sku": 2, "about": "snow\\u2028", "before": "1800-01-01", "most": "7"}\r\n'
        '{"sku": "c", "about": "", "before": "1800-01-01"}\n{"sku": "d", "about": "", "before": "1800-01-01"}'
    )
    code, out, err = batch("submit", f"{program}:book", "items.jsonl", "--id", "sku")
    assert (code, out) == (0, "pool/m@batch_1\n")
    assert err == "diptych: 4 items; `diptych batch wait pool/m@batch_1` waits for them\n"
    assert [prompt.partition("\n")[0] for prompt in prompts(model)[:2]] == [
        "tea datetime.date(1900, 1, 1) 3",
        "snow\u2028 datetime.date(1800, 1, 1) 7",
    ]
    code, out, err = batch("results", out.strip(), f"{program}:book")
    assert (code, out) == (1, "")
    assert err == "diptych: in_progress, 0 of 4: `diptych batch wait pool/m@batch_1` waits for it\n"
    code, out, err = batch("wait", "pool/m@batch_1", "--poll", "0.05")
    assert (code, out) == (0, "pool/m@batch_1  book  completed, 4 of 4, 1 failed\n")
    assert err == "diptych: completed, 4 of 4, 1 failed\n"
    code, out, err = batch("results", "pool/m@batch_1", f"{program}:book")
    assert code == 1
    good, wrong, limited, calls = lines(out)
    assert good == {"id": "a", "value": {"title": "Emma", "year": 1815}}
    assert wrong["id"] == "2"
    assert wrong["error"]["type"] == "InvalidOutput"
    assert wrong["error"]["text"] == "no book"
    assert limited["error"]["type"] == "ProviderError"
    assert calls == {"id": "d", "tool_calls": [{"name": "look", "arguments": {}}]}
    assert err.startswith("diptych: 2 of 4 items answered, 2 failed; ")
    code, out, _ = batch("results", "pool/m@batch_1")
    assert lines(out)[1] == {"id": "2", "value": "no book"}
    code, out, _ = batch("status", "pool/m@batch_1", "--json")
    assert (code, json.loads(out)["state"], json.loads(out)["call"]) == (0, "completed", "book")


def test_values_alone_come_from_stdin_and_results_at_once(program: str) -> None:
    model = answering("x", "y", "z")
    words = ("submit", f"{program}:repeat", "-", "--wait", "--poll", "0.05", "--model", "pool/other")
    code, out, err = batch(*words, stdin='"a"\n{"text": "b", "mark": "?"}\n"c"\n')
    assert (code, prompts(model)) == (0, ["a!", "b?", "c!"])
    assert lines(out) == [{"id": f"item-000{at}", "value": value} for at, value in enumerate("xyz")]
    assert err.splitlines()[0] == "diptych: 3 items in pool/other@batch_1"
    assert "completed, 3 of 3" in err
    assert {body["model"] for body in model.requests} == {"other"}


def test_every_kind_of_parameter_is_filled(program: str) -> None:
    for function, line, prompt in (
        ("positional", '{"b": 2, "a": "1"}', "1 2 Context"),
        ("mixed", '{"a": 1, "c": 9, "d": 4, "e": 5}', "1 2 9 4 {'e': 5} Context"),
        ("anything", '{"x": 1, "y": 2}', "{'x': 1, 'y': 2}"),
        ("words", '"rain"', "words about rain"),
        ("sku", '{"id": 7}', "7"),
    ):
        model = answering("yes")
        Path("one.jsonl").write_text(line)
        more = ["--id", "id"] if function == "sku" else []
        code, out, err = batch("submit", f"{program}:{function}", "one.jsonl", "--model", "pool/m", *more)
        assert (code, prompts(model)) == (0, [prompt]), err
        assert out == "pool/m@batch_1\n"  # what a file prints is no part of it


def test_an_error_of_the_functions_own_code_is_told_with_its_lines_and_the_item(program: str) -> None:
    model = answering("never")
    Path("items.jsonl").write_text("7\n")
    code, out, err = batch("submit", f"{program}:wrong", "items.jsonl")
    assert (code, out, model.requests) == (1, "", [])
    assert 'return "number " + number' in err
    assert "raised TypeError: can only concatenate str" in err
    assert "the item 'item-0000'" in err


def test_stdin_that_is_closed_is_a_mistake(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", err)
    assert batch_command.submit(f"{program}:repeat", "-") == 2
    assert err.getvalue() == "diptych: stdin is closed: give a file with a line of JSON for each item\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_results_are_json_on_every_stdout(encoding: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answering("caf\u00e9 \U0001f600")
    Path("items.jsonl").write_text('"a"')
    batch("submit", f"{program}:repeat", "items.jsonl", "--wait", "--poll", "0.05")
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    assert batch_command.results("pool/echo@batch_1") == 0
    assert json.loads(content.getvalue().decode(encoding))["value"] == "caf\u00e9 \U0001f600"


def test_a_state_file_makes_the_same_command_go_on(program: str) -> None:
    model = answering("x", "never")
    Path("items.jsonl").write_text('"a"\n')
    first = batch("submit", f"{program}:repeat", "items.jsonl", "--state-file", "job.json")
    again = batch("submit", f"{program}:repeat", "items.jsonl", "--state-file", "job.json")
    assert first == again
    assert model.left == 1
    Path("items.jsonl").write_text('"b"\n')
    code, _, err = batch("submit", f"{program}:repeat", "items.jsonl", "--state-file", "job.json")
    assert code == 2
    assert "has other requests than these items make" in err
    Path("second.json.new").touch()  # of a command that begins it now
    code, out, err = batch("submit", f"{program}:repeat", "items.jsonl", "--state-file", "second.json")
    assert (code, out, model.left) == (2, "", 1)
    assert "second.json.new is there: another program begins the batch right now" in err
    assert sorted(path.name for path in Path().glob("*.json*")) == ["items.jsonl", "job.json", "second.json.new"]


def test_a_pause_without_end_is_refused_before_anything_is_sent(program: str) -> None:
    model = answering("never")
    Path("items.jsonl").write_text('"a"\n')
    for pause in ("inf", "nan", "0"):
        code, out, _ = batch("submit", f"{program}:repeat", "items.jsonl", "--wait", "--poll", pause)
        assert (code, out, model.requests) == (2, "", [])


def test_batches_are_listed_and_cancelled(program: str) -> None:
    answering("x", "y")
    Path("items.jsonl").write_text('"a"\n')
    for _ in range(2):
        batch("submit", f"{program}:repeat", "items.jsonl")
    assert batch("cancel", "pool/echo@batch_1") == (0, "pool/echo@batch_1  repeat  cancelled, 0 of 1\n", "")
    code, out, _ = batch("list")
    assert (code, [line.split("  ")[0] for line in out.splitlines()]) == (0, ["pool/echo@batch_2", "pool/echo@batch_1"])
    code, out, _ = batch("list", "--limit", "1", "--json")
    assert [one["job"] for one in lines(out)] == ["pool/echo@batch_2"]
    code, out, _ = batch("wait", "pool/echo@batch_1")
    assert code == 1
    code, out, _ = batch("results", "pool/echo@batch_1", f"{program}:repeat")
    assert (code, lines(out)[0]["error"]["type"]) == (1, "ProviderError")


def test_a_place_that_the_files_registry_alone_knows(program: str) -> None:
    Path("items.jsonl").write_text('"a"\n')
    code, out, _ = batch("submit", f"{program}:elsewhere", "items.jsonl")
    assert (code, out) == (0, "mine/m@batch_1\n")
    code, _, err = batch("status", "mine/m@batch_1")
    assert code == 2
    assert "there is no provider 'mine'" in err
    assert batch("list", "mine", f"{program}:elsewhere")[0] == 0


MISTAKES = [
    ("repeat", None, [], "the file 'items.jsonl' is not there: give one with a line of JSON for each item"),
    ("repeat", "\n \n", [], "items.jsonl has no items: write a line of JSON for each"),
    ("repeat", '"a"\n"b"\nc\n', [], "items.jsonl: line 3: this is no JSON: expected value at column 1"),
    ("repeat", '"a"\n"\udcff"', [], "items.jsonl: line 2: this is no JSON: "),
    ("two", '{"a": 1, "b": NaN}', [], "items.jsonl: line 1: this is no JSON: "),
    ("repeat", '\n{"text": "a"', [], "items.jsonl: line 2: this is no JSON: EOF"),
    ("repeat", '{"txt": "a"}', [], "line 1: repeat has no parameter 'txt': did you mean text? it takes text, mark"),
    ("repeat", '{"mark": "a"}', [], "line 1: repeat: missing text (text)"),
    ("repeat", '{"text": ["a"]}', [], "line 1: repeat: text ['a'] is no text: Input should be a valid string"),
    ("two", "7", [], "line 1: 7 is one value, and two takes a, b: write an object of them by name"),
    ("two", '{"a": 1, "b": "many"}', [], "line 1: two: b 'many' is no int: "),
    ("repeat", '"a"', ["--id", "sku"], "line 1: there is no 'sku', which --id names"),
    ("repeat", '{"sku": null, "text": "a"}', ["--id", "sku"], "'sku' is None, and ids are texts or whole numbers"),
    (
        "repeat",
        '{"sku": 1, "text": "a"}\n\n{"sku": "1", "text": "b"}',
        ["--id", "sku"],
        "items.jsonl: line 3: the id '1' is that of line 1",
    ),
    ("plain", '"a"', [], "plain is a plain function: a batch takes a function that is decorated with @llm.call"),
    ("agent", '"a"', [], "agent is an agent: a batch takes"),
    ("words", '"a"', [], "words is a prompt without a model: add --model PREFIX/MODEL"),
    ("repat", '"a"', [], "has no 'repat': did you mean repeat? there are: repeat, "),
    ("repeat", '"a"', ["--model", "nobody/m"], "there is no provider 'nobody'"),
    ("repeat", '"a"', ["--model", "m"], "'m' is no model: write PREFIX/MODEL"),
    ("repeat", '"a"', ["--state-file", "x" * 250 + ".json"], "cannot be written to (File name too long)"),
    ("repeat", '"a"', ["--state-file", "x" * 300], "cannot be written to (File name too long)"),
    ("repeat", '"a"', ["--state-file", "."], "Is a directory"),
    ("repeat", json.dumps({"x" * 500: 1}), [], f"repeat has no parameter '{'x' * 76}...: it takes text, mark"),
    ("repeat", '"a"', ["--state-file", "no/such/job.json"], "cannot be written to (No such file or directory)"),
]


@pytest.mark.parametrize(("function", "items", "more", "words"), MISTAKES)
def test_a_mistake_is_a_sentence_and_exit_code_2(
    function: str, items: str | None, more: list[str], words: str, program: str
) -> None:
    model = answering("never")
    if items is not None:
        Path("items.jsonl").write_bytes(items.encode(errors="surrogateescape"))
    code, out, err = batch("submit", f"{program}:{function}", "items.jsonl", *more)
    assert (code, out, model.requests) == (2, "", [])
    assert err.startswith("diptych: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["status", "batch_7"], "'batch_7' names no batch: write PREFIX/MODEL@ID"),
        (["results", "pool/m@batch_7"], "pool has no batch 'batch_7': `diptych batch list pool` shows those it has"),
        (["cancel", "pool/m@batch_7"], "pool has no batch 'batch_7'"),
        (["wait", "pool/m@batch_7"], "pool has no batch 'batch_7'"),
        (["status", "nobody/m@batch_7"], "there is no provider 'nobody'"),
        (["list", "nobody"], "there is no provider 'nobody'"),
        (["status", "google/gemini@b"], "google/gemini: no batches there"),
        (["status", "pool/m@b", "none.py:f"], "the file 'none.py' is not there"),
    ],
)
def test_an_unknown_job_is_a_sentence_and_exit_code_2(
    given: list[str], words: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_default", Registry(environ={"GOOGLE_API_KEY": "k", "GEMINI_API_KEY": "k"}))
    answering()
    code, out, err = batch(*given)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_the_results_of_another_function_are_not_read_as_its_own(program: str) -> None:
    answering("x")
    Path("items.jsonl").write_text('"a"\n')
    batch("submit", f"{program}:repeat", "items.jsonl", "--wait", "--poll", "0.05")
    code, out, err = batch("results", "pool/echo@batch_1", f"{program}:book")
    assert (code, out) == (2, "")
    assert "the batch batch_1 is of repeat, not of book" in err


def test_ctrl_c_leaves_the_batch_and_says_how_to_go_on(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    answering("x")
    monkeypatch.setattr(llm.BatchJob, "wait", interrupted)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"a"')))
    assert batch_command.submit(f"{program}:repeat", "-", poll_s=1.0) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "the batch goes on: `diptych batch wait pool/echo@batch_1`" in err


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with batch_bench() as made:
        yield made


async def test_another_process_goes_on_with_a_job_of_a_cluster(bench: Bench, program: str) -> None:
    """Each command is a process of its own, beside a front door with its store; torch and ray are not needed."""
    code = (
        "import sys; from diptych.cluster.cli import app\n"
        "try: app(prog_name='diptych')\n"
        "finally: assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    environ = {**os.environ, "DIPTYCH_URL": bench.door.listener.url}

    async def said(*words: str) -> tuple[int | None, str, str]:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, "batch", *words, env=environ, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(child.communicate(), 120)
        return child.returncode, out.decode(), err.decode()

    items = '{"sku": "z", "text": "abc"}\n{"sku": "a", "text": "xyz"}\n'
    await asyncio.to_thread(Path("items.jsonl").write_text, items)
    done, job, err = await said("submit", f"{program}:repeat", "items.jsonl", "--id", "sku")
    assert (done, job.count("\n")) == (0, 1), err
    job = job.strip()
    assert job.startswith("pool/echo@batch_")
    done, out, err = await said("list")
    assert (done, out.split("  ")[0], " repeat " in out) == (0, job, True), err
    await bench.runner().start()
    done, out, err = await said("wait", job, "--poll", "0.2")
    assert done == 0, err
    assert "completed, 2 of 2" in out
    done, out, err = await said("results", job, f"{program}:repeat")
    assert (done, [one["id"] for one in lines(out)]) == (0, ["z", "a"]), err
    assert all(one["value"] for one in lines(out))
    assert "2 of 2 items answered, 0 failed; " in err
    done, out, err = await said("cancel", job)
    assert (done, out) == (1, "")
    done, out, err = await said("status", "pool/echo@batch_unknown")
    assert (done, out) == (2, "")
    assert err.startswith("diptych: pool has no batch 'batch_unknown'")


def test_the_example_runs_from_a_command_line(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_MODEL", "pool/m")
    example = Path(__file__).parents[3] / "examples" / "llm" / "batch.py"
    answering({"value": "good"}, {"value": "bad"})
    Path("reviews.jsonl").write_text('"I loved it."\n{"review": "I left early."}\n')
    code, job, _ = batch("submit", f"{example}:judge", "reviews.jsonl")
    assert (code, job) == (0, "pool/m@batch_1\n")
    batch("wait", job.strip(), "--poll", "0.05")
    code, out, _ = batch("results", job.strip(), f"{example}:judge")
    assert (code, [one["value"] for one in lines(out)]) == (0, ["good", "bad"])
