"""What `diptych run` shows of streams, agents and generators, and how it behaves as a process beside a real server.

Guards against answers that are shown only when they are whole, lines that are no JSON, agents that wait for somebody
and end with 0, files that see another sys.argv than `python FILE` gives them, and a Ctrl-C that leaves the server at
work or shows a traceback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diptych.agents.llm import Registry, registry
from diptych.agents.llm.command import run
from diptych.agents.llm.testing import Entry, Said, ScriptedModel, cut, tool_call

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel

from diptych import llm


class Book(BaseModel):
    title: str
    year: int


@dataclass
class Shelf:
    tea: int


def stock(item: str, ctx: llm.Context[Shelf]) -> int:
    "How many there are."
    return getattr(ctx.deps, item)


@llm.tool(needs_approval=True)
def order(item: str) -> str:
    "Order it."
    return item


@llm.call("pool/m", retries=llm.Retries(attempts=3, base_s=0.0))
def ask(question: str) -> str:
    return question


@llm.call("pool/m", output=Book)
async def book(about: str) -> str:
    return about


@llm.call("pool/m", output=list[Book])
def books(about: str) -> str:
    return about


@llm.call("pool/m", tools=[stock])
def asks_tools(about: str) -> str:
    return about


keeper = llm.Agent("pool/m", name="keeper", tools=[stock], deps=Shelf)
librarian = llm.Agent("pool/m", name="librarian", tools=[stock], deps=Shelf, output=Book)
buyer = llm.Agent("pool/m", name="buyer", tools=[order])


def streamed(about: str):
    return books.stream(about)


def pieces(words: Iterable[str]):
    for word in words:
        yield word + " "


async def later(most: int):
    for at in range(most):
        yield at


def unwritable() -> object:
    return object()


def odd() -> str:
    return "\\u00e9 \\ud800"


def arguments(first: int = 1, second: int = 2, /, *, third: int = 3, **others: float) -> object:
    return [sys.argv[1:], first, second, third, others]


def leave() -> None:
    sys.exit(3)


class Kit:
    def twice(self, number: int) -> int:
        return 2 * number


kit = Kit()
"""
BOOKS = [{"title": "Emma", "year": 1815}, {"title": "\u00c9mile", "year": 1762}]


class Shown:
    """A stdout that tells each write apart."""

    def __init__(self) -> None:
        self.writes: list[str] = []
        self.flushed = 0

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)

    def flush(self) -> None:
        self.flushed = len(self.writes)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(registry, "_default", Registry(environ={}))
    file = tmp_path / "program_of_results.py"
    file.write_text(PROGRAM)
    yield str(file)
    for name in [one for one in sys.modules if one.startswith("program_of_results")]:
        del sys.modules[name]


def answering(*entries: Entry) -> ScriptedModel:
    model = ScriptedModel(entries)
    registry.default_registry().add("pool", model)
    return model


def test_each_piece_is_shown_before_the_next_one_comes(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(Said(pieces=("one ", "two ", "three")))
    shown = Shown()
    monkeypatch.setattr(sys, "stdout", shown)
    assert run(f"{program}:ask", ["--question", "q"], stream=True) == 0
    assert shown.writes == ["one ", "two ", "three", "\n"]
    assert shown.flushed == 4


def test_an_answer_that_breaks_off_ends_its_line(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering(*[cut("onetwo", after=2)] * 3)
    assert run(f"{program}:ask", ["--question", "q"], stream=True) == 1
    out, err = capsys.readouterr()
    assert out == "onet\n" * 3
    assert err.count("diptych: ask begins anew (retry): ") == 2
    assert "3 attempts, " in err


def test_typed_streams_are_lines_of_json(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering(*[BOOKS] * 3, BOOKS[1])
    for function in ("books", "streamed"):
        assert run(f"{program}:{function}", ["--about", "q"], stream=True) == 0, capsys.readouterr().err
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == BOOKS
    assert run(f"{program}:streamed", ["--about", "q"]) == 0
    assert json.loads(capsys.readouterr().out) == BOOKS
    assert run(f"{program}:book", ["--about", "q"], stream=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == BOOKS[1]
    assert all(line.items() <= BOOKS[1].items() for line in lines)
    assert len({json.dumps(line) for line in lines}) == len(lines), "the same is told twice"


def test_an_agent_takes_its_deps_and_tells_what_it_does(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Said(text="let me see", calls=(("stock", {"item": "tea"}),))
    answering(calls, "four", calls, BOOKS[0], calls, "four")
    given = ["--prompt", "tea?", "--deps", '{"tea": 4}']
    assert run(f"{program}:keeper", given, stream=True) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert out == "let me see\nfour\n"
    assert err == "diptych: keeper calls stock {'item': 'tea'}\ndiptych: stock: Ok\n"
    assert run(f"{program}:librarian", given, stream=True) == 0
    assert json.loads(capsys.readouterr().out) == BOOKS[0]
    assert run(f"{program}:keeper", given, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["value"], told["turns"], told["tool_calls"], told["spent"]["requests"]) == ("four", 2, 1, 2)
    assert run(f"{program}:keeper", ["--prompt", "tea?"]) == 2
    assert "missing --deps (program_of_results.Shelf)" in capsys.readouterr().err
    assert run(f"{program}:keeper", ["--prompt", "tea?", "--deps", '{"te": 4}']) == 2
    assert "/tea: Field required" in capsys.readouterr().err


def test_what_waits_for_somebody_has_no_value_and_ends_with_1(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    answering(*[tool_call("order", item="tea")] * 3, tool_call("stock", item="tea"))
    for shown in ({}, {"stream": True}, {"as_json": True}):
        assert run(f"{program}:buyer", ["--prompt", "tea"], **shown) == 1
        out, err = capsys.readouterr()
        assert "buyer: there is no value yet, the run waits for order (call_0: approval)" in err
        assert bool(out) == ("as_json" in shown)
    told = json.loads(out)
    assert "value" not in told
    assert told["pending"][0]["arguments"] == {"item": "tea"}
    assert run(f"{program}:asks_tools", ["--about", "tea"], as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["tool_calls"] == [{"name": "stock", "arguments": {"item": "tea"}}]


def test_generators_methods_and_odd_values(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    for function, given, out in (
        ("pieces", ["--words", "a", "--words", "b"], "a b \n"),
        ("later", ["--most", "2"], "0\n1\n"),
        ("kit.twice", ["--number", "-4"], "-8\n"),
    ):
        assert run(f"{program}:{function}", given) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == out
    assert run(f"{program}:later", ["--most", "2"], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"value": [0, 1]}
    assert run(f"{program}:unwritable") == 1
    assert "unwritable gave what JSON cannot say, a value of the type object" in capsys.readouterr().err
    assert run(f"{program}:odd") == 0
    assert capsys.readouterr().out == "\u00e9 \\ud800\n"
    with pytest.raises(SystemExit, match="3"):
        run(f"{program}:leave")


def test_the_file_sees_no_argument_of_the_command(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["diptych", "run", "x", "--second", "5"])
    path = list(sys.path)
    assert run(f"{program}:arguments", ["--second", "5", "--third=-1", "--others", "2"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out) == [[], 1, 5, -1, {"others": 2.0}]
    assert sys.argv[1:] == ["run", "x", "--second", "5"]
    assert sys.path == path


def test_files_find_what_lies_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As modules of their package, where they lie in one; a name that another module has is taken from nobody."""
    package = tmp_path / "package_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "words.py").write_text("WORD = 'beside'\n")
    (package / "inner.py").write_text("from .words import WORD\ndef f() -> str: return WORD\n")
    (tmp_path / "json.py").write_text("import words_of_a_test\ndef f() -> str: return words_of_a_test.WORD\n")
    (tmp_path / "words_of_a_test.py").write_text("WORD = 'there'\n")
    try:
        for file, word in ((package / "inner.py", "beside"), (tmp_path / "json.py", "there")):
            assert run(f"{file}:f") == 0, capsys.readouterr().err
            assert capsys.readouterr().out == f"{word}\n"
        assert sys.modules["json"] is json
    finally:
        for name in [one for one in sys.modules if "of_a_test" in one or "of_this_file" in one]:
            del sys.modules[name]


class Server(ThreadingHTTPServer):
    """Answers chat completions; of those that ask for a stream, only the beginning."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.began = threading.Event()
        self.left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        told = {"id": "x", "model": "m", "created": 0}
        if not body.get("stream"):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}
            document = json.dumps(told | {"object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(document)))
            self.end_headers()
            self.wfile.write(document)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        choice = {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": "begun"}}
        chunk: dict[str, Any] = told | {"object": "chat.completion.chunk", "choices": [choice]}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.server.began.set()
        if self.rfile.read(1) == b"":
            self.server.left.set()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_as_a_process_it_leaves_nothing_open_and_ctrl_c_ends_the_answer(program: str, server: Server) -> None:
    # Who runs the tests in the background has the signal ignored, and so would this.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-W", "error", "-c", f"{heard}; from diptych.cluster.cli import main; main()", "run"]
    environ = os.environ | {"DIPTYCH_URL": f"http://127.0.0.1:{server.server_port}", "DIPTYCH_API_KEY": ""}

    def begun(*given: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, f"{program}:ask", "--question", "q", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            cwd=ROOT,
        )

    with begun() as whole, begun("--stream") as stopped:
        assert stopped.stdout is not None
        assert stopped.stdout.read(5) == "begun"
        stopped.send_signal(signal.SIGINT)
        assert stopped.communicate(timeout=60) == ("\n", "")
        assert stopped.returncode == 130
        assert server.left.wait(60), "the server still thinks that somebody reads"
        assert whole.communicate(timeout=60) == ("hello\n", "")
        assert whole.returncode == 0
