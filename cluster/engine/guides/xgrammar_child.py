"""The process that compiles schemas by xgrammar, each in a fork that may be ended at any time: importing the library
takes seconds, a fork milliseconds. Started by xgrammar_matcher.py alone.

Lines of JSON: first the tokenizer as xgrammar writes it; then `[schema, seconds]` in, and the compiled grammar, or why
there is none, out. Time and memory are bounded: what takes more, or crashes the library, ends a fork and no engine.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

MEMORY_BYTES = 4 << 30  # of address space beyond what the libraries take
MAX_COMPILED_BYTES = 64 << 20


def main(requests: TextIO, answers: TextIO) -> None:
    """Until the end of `requests`."""
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(requests.readline()))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)  # no threads: it is forked
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a fork also within the library
    answers.write("{}\n")
    answers.flush()
    for line in requests:
        schema, seconds = json.loads(line)
        answers.write(_apart(compiler, schema, seconds) + "\n")
        answers.flush()


def _apart(compiler: Any, schema: str, seconds: float) -> str:
    reading, writing = os.pipe()
    if (fork := os.fork()) == 0:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            answer = json.dumps(_compiled(compiler, schema))
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(1)  # nothing of what the process above has left to do is done twice
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(fork, 0)
    if status == 0:
        return answer
    is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return json.dumps({"ended": "it took too long" if is_late else "its process ended"})


def _compiled(compiler: Any, schema: str) -> dict[str, str]:
    try:
        compiled = compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"), strict_mode=False)
        text: str = compiled.serialize_json()
    except Exception as exc:  # the library raises RuntimeError with C++'s words
        return {"error": str(exc).strip().splitlines()[-1][:300] if str(exc).strip() else repr(exc)}
    if len(text) > MAX_COMPILED_BYTES:
        return {"error": "the compiled grammar is too large"}
    return {"compiled": text}


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
