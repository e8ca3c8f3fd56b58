"""`diptych chat`: a conversation in the terminal with any server that speaks OpenAI's chat completions.

Ctrl-C stops an answer, Ctrl-D or /exit leaves. With piped input each line is one question.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TextIO

from diptych.cluster.client import Client, ModelCard
from diptych.cluster.config import api_key
from diptych.protos.errors import DiptychError, UnknownModel

DEFAULT_URL = "http://127.0.0.1:8000"
TEMPERATURE = 0.3  # where neither the person nor the model names one: small models wander above 0.5


@dataclass
class Conversation:
    """The turns so far. `ask` adds two, or none when the answer fails."""

    client: Client
    model: str
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None  # None: the server's choice
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces. Raises DiptychError. Closing the iterator stops the answer and keeps what came."""
        messages = [*self._system_turn(), *self.turns, {"role": "user", "content": question}]
        wanted: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        named = {name: value for name, value in wanted.items() if value is not None}
        pieces: list[str] = []
        failed = False
        try:
            for delta in self.client.stream_chat(messages, model=self.model, **named):
                if delta.text:
                    pieces.append(delta.text)
                    yield delta.text
        except DiptychError:
            failed = True
            raise
        finally:
            if pieces and not failed:
                self.turns.append({"role": "user", "content": question})
                self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _system_turn(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def chat(
    url: str = DEFAULT_URL,
    *,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Run until the input ends; returns the exit code: 1 when the server could not be used."""
    stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    if stdin is None or stdout is None:  # the shell closed them (<&-), and Python has None for that
        print("chat needs an input and an output; both must be open", file=stderr)
        return 1
    try:
        with Client(url, key=api_key()) as client:
            card = _card(client, model)
            if temperature is None and "temperature" not in card.sampling_defaults:
                temperature = TEMPERATURE
            conversation = Conversation(client, card.name, system, max_tokens, temperature)
            return _converse(conversation, stdin, stdout, stderr)
    except DiptychError as exc:
        print(exc, file=stderr)
        return 1


def _card(client: Client, model: str | None) -> ModelCard:
    """Of the model that is meant; of an unknown name as if the server had one, so that its refusal is shown."""
    cards = client.models()
    if model is not None:
        unknown = ModelCard(name=model, max_context_tokens=None, sampling_defaults={})
        return next((card for card in cards if card.name == model), unknown)
    if not cards:
        raise UnknownModel(f"the server at {client.url} serves no model")
    return cards[0]


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
        except DiptychError as exc:
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
        pieces.close()
        stdout.flush()
