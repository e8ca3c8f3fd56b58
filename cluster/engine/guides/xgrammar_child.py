"""The process that compiles schemas by xgrammar: it may be ended at any time. Started by xgrammar_matcher.py alone.

Lines of JSON: first the tokenizer as xgrammar writes it; then each schema in, and the compiled grammar, or why there is
none, out. Memory is bounded: what takes more ends this process and no engine.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import TextIO

MEMORY_BYTES = 4 << 30  # of address space beyond what the libraries take
MAX_COMPILED_BYTES = 64 << 20
LONGEST_S = 10.0  # of one schema: whoever waits ends this process long before, unless that one has ended itself


def main(requests: TextIO, answers: TextIO) -> None:
    """Until the end of `requests`."""
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(requests.readline()))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process also within the library
    _tell(answers, {})
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        try:
            compiled = compiler.compile_json_schema(
                json.loads(line), any_whitespace=False, separators=(",", ":"), strict_mode=False
            )
            text = compiled.serialize_json()
        except Exception as exc:  # the library raises RuntimeError with C++'s words
            _tell(answers, {"error": str(exc).strip().splitlines()[-1][:300] if str(exc).strip() else repr(exc)})
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        too_large = len(text) > MAX_COMPILED_BYTES
        _tell(answers, {"error": "the compiled grammar is too large"} if too_large else {"compiled": text})


def _tell(answers: TextIO, answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
