"""`diptych chat`: a conversation in the terminal with any server that speaks OpenAI's chat completions.

Ctrl-C stops an answer, Ctrl-D or /exit leaves. With piped input each line is one question.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx2

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT = httpx2.Timeout(connect=5, read=600, write=10, pool=5)


class ChatError(Exception):
    """The server cannot be reached or refuses; the text is for the person."""


@dataclass
class Conversation:
    """The turns so far. `ask` adds two, or none when the answer fails."""

    client: httpx2.Client
    model: str
    system: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.3
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces. Raises ChatError. Closing the iterator stops the answer and keeps what came."""
        messages = [*self._system_turn(), *self.turns, {"role": "user", "content": question}]
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "stream": True,
        }
        if self.max_tokens is not None:
            wanted["max_tokens"] = self.max_tokens
        pieces: list[str] = []
        failed = False
        try:
            for piece in self._stream(wanted):
                pieces.append(piece)
                yield piece
        except ChatError:
            failed = True
            raise
        finally:
            if pieces and not failed:
                self.turns.append({"role": "user", "content": question})
                self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _system_turn(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _stream(self, wanted: dict[str, Any]) -> Iterator[str]:
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=wanted) as response:
                if response.status_code != 200:
                    raise ChatError(_refusal(response.read(), response.status_code))
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield from _text_of(json.loads(line[6:]))
        except httpx2.HTTPError as exc:
            raise ChatError(f"the connection to the server broke: {exc}") from exc
        raise ChatError("the answer broke off")


def _text_of(event: dict[str, Any]) -> Iterator[str]:
    if "error" in event:
        raise ChatError(str(event["error"]["message"]))
    for choice in event["choices"]:
        if text := choice["delta"].get("content"):
            yield text


def _refusal(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"


def _first_model(client: httpx2.Client, url: str) -> str:
    try:
        response = client.get("/v1/models")
        models = [str(card["id"]) for card in response.json()["data"]]
    except httpx2.ConnectError:
        raise ChatError(
            f"no server answers at {url}; start one with `diptych serve`, or name another with --url"
        ) from None
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as exc:
        raise ChatError(f"{url} is not a Diptych or OpenAI-compatible server: {exc}") from exc
    if not models:
        raise ChatError(f"the server at {url} serves no model")
    return models[0]


def chat(
    url: str = DEFAULT_URL,
    *,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.3,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Run until the input ends; returns the exit code: 1 when the server could not be used."""
    stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    if stdin is None or stdout is None:  # the shell closed them (<&-), and Python has None for that
        print("chat needs an input and an output; both must be open", file=stderr)
        return 1
    url = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx2.Client(base_url=url, timeout=_TIMEOUT) as client:
            name = model or _first_model(client, url)
            conversation = Conversation(client, name, system, max_tokens, temperature)
            return _converse(conversation, stdin, stdout, stderr)
    except (ChatError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as exc:
        print(exc, file=stderr)
        return 1


def _converse(conversation: Conversation, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> int:
    at_terminal = stdin.isatty()
    if at_terminal:
        print(f"{conversation.model} - Ctrl-C stops an answer, Ctrl-D or /exit leaves", file=stdout)
    code = 0
    while True:
        try:
            question = _read(stdin, stdout, at_terminal)
        except KeyboardInterrupt:
            print(file=stdout)
            continue
        if question is None or question == "/exit":
            return code
        if not question:
            continue
        try:
            _answer(conversation, question, stdout)
        except ChatError as exc:
            print(f"\n{exc}", file=stderr)
            code = 1


def _read(stdin: TextIO, stdout: TextIO, at_terminal: bool) -> str | None:
    """The next question; None at the end of the input."""
    if at_terminal:
        stdout.write("\n> ")
        stdout.flush()
    line = stdin.readline()
    if not line and at_terminal:
        print(file=stdout)
    # A terminal may send bytes that are no UTF-8; Python hands them on as surrogates, which JSON cannot carry.
    return line.encode(errors="replace").decode().strip() if line else None


def _answer(conversation: Conversation, question: str, stdout: TextIO) -> None:
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            stdout.write(piece)
            stdout.flush()
        stdout.write("\n")
    except KeyboardInterrupt:
        stdout.write(" [stopped]\n")
    finally:
        pieces.close()  # type: ignore[attr-defined]
        stdout.flush()
