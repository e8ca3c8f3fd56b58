"""xgrammar behind the interface of matcher.py, for schemas that llguidance refuses.

It compiles without a bound on time and has crashed on odd schemas, so it does that in forks of another process, each
ended after its time (xgrammar_child.py); the process is begun with the first such schema. Importing xgrammar takes
seconds: it happens there, and here once it is needed. It says of nothing that it must follow: every token is sampled.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import llguidance

from diptych.protos.errors import InvalidRequest

from .matcher import Compiled, Matcher, Words, narrow

SILENT_S = 60.0  # a process that says nothing for so long is ended; it imports the library, on a machine that is busy
COMPILE_S = 1.5

log = logging.getLogger(__name__)


class Xgrammar:
    """See matcher.Backend. `compile` may be called by one thread at a time per process; others wait for it."""

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        try:
            import xgrammar
        except ImportError as exc:
            raise InvalidRequest(
                "the form of the answer needs xgrammar, which this installation lacks: pip install 'diptych[xgrammar]'"
            ) from exc
        plain = llguidance.LLTokenizer(str(tokenizer_file))
        words = [b"" if plain.is_special_token(i) else plain.decode_bytes([i]) for i in range(plain.vocab_size)]
        self._vocab_size = vocab_size
        self._library: Any = xgrammar
        self._info = xgrammar.TokenizerInfo(
            words, vocab_size=max(vocab_size, len(words)), stop_token_ids=list(end_tokens)
        )
        self._child = _Child(json.dumps(self._info.serialize_json()))
        self._child.start()  # it takes seconds, which no schema's deadline is to count

    def compile(self, grammar: str) -> Compiled:
        """See matcher.Backend. `grammar`: a JSON schema."""
        answer = self._child.ask(json.dumps([grammar, COMPILE_S]))
        if "ended" in answer:
            raise InvalidRequest(f"the form of the answer could not be compiled: {answer['ended']}; make it simpler")
        if "error" in answer:
            raise InvalidRequest(f"the form of the answer cannot be enforced: {answer['error']}")
        return _XgrammarGrammar(self._library, answer["compiled"], self._info, self._vocab_size)

    def close(self) -> None:
        """See matcher.Backend."""
        self._child.close()


class _XgrammarGrammar:
    def __init__(self, library: Any, text: str, info: Any, vocab_size: int) -> None:
        self._library = library
        self._compiled = library.CompiledGrammar.deserialize_json(text, info)
        self._info = info
        self._vocab_size = vocab_size

    def start(self) -> Matcher:
        matcher = self._library.GrammarMatcher(self._compiled)
        return _XgrammarMatcher(self._library, matcher, self._info, self._vocab_size)


class _XgrammarMatcher:
    def __init__(self, library: Any, matcher: Any, info: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = library.allocate_token_bitmask(1, info.vocab_size)
        self._vocab_size = vocab_size
        self.error = ""

    def consume(self, token: int) -> bool:
        is_taken = bool(self._matcher.accept_token(token))
        if not is_taken:
            self.error = "xgrammar does not allow a token that was sampled"
        return is_taken

    def fill(self, mask_W: Words) -> None:
        if self._matcher.is_terminated():
            mask_W.fill(0)
            return
        self._matcher.fill_next_token_bitmask(self._mask)
        narrow(self._mask.numpy()[0], mask_W, self._vocab_size)

    def forced(self) -> list[int]:
        return []

    def is_over(self) -> bool:
        return False

    def consume_text(self, text: str) -> bool:
        return bool(self._matcher.accept_string(text))


class _Child:
    """The compiling process, started when it is first asked, and again after it had to be ended."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()
        self._is_closed = False

    def ask(self, line: str) -> dict[str, str]:
        """The answer to one line. Raises InvalidRequest when there is none in time."""
        with self._turn:
            process = self._ready()
            try:
                return self._exchange(process, line)
            except _Ended as exc:
                self._end()
                raise InvalidRequest(f"the form of the answer could not be compiled: {exc}") from None

    def start(self) -> None:
        """Have the process ready. Raises InvalidRequest when it cannot be started."""
        with self._turn:
            self._ready()

    def _ready(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._begin()
        return self._process

    def _begin(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "diptych.cluster.engine.guides.xgrammar_child"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._process = process
        try:
            if self._is_closed:  # looked at after the process could be seen by `close`
                raise _Ended("the engine is shutting down")
            self._exchange(process, self._tokenizer)
        except _Ended as exc:
            self._end()
            raise InvalidRequest(f"xgrammar, which this schema needs, did not start: {exc}") from None
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str) -> dict[str, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(SILENT_S, process.kill)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return _read(process.stdout, timer.is_alive)
        except BrokenPipeError:
            raise _Ended("its process ended") from None
        finally:
            timer.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def close(self) -> None:
        """End the process; whoever waits for its answer sees that it has ended."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._turn:
            self._end()


class _Ended(Exception):
    """The process has no answer."""


def _read(answers: IO[str], has_time: Callable[[], bool]) -> dict[str, str]:
    line = answers.readline()
    if not line.endswith("\n"):
        raise _Ended("it took too long" if not has_time() else "its process ended")
    answer: dict[str, str] = json.loads(line)
    return answer
