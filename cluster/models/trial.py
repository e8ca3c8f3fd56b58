"""Runs a model's chat template once before anything starts, in a process of its own that may take little and is ended.

`check_template(source)` is called by source.py for what no checksum pins; `python -m ...trial` is that process.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import subprocess
import sys
import time

from diptych.protos.errors import StartupError

MEMORY_BYTES = 64 << 20
CPU_S = 1.0
WAIT_S = 60.0  # for a machine that is busy; the limit that ends a template is that of CPU time
_ASK = [{"role": "user", "content": "hello"}]
_CONVERSATIONS = (
    _ASK,
    [{"role": "system", "content": "be brief"}, *_ASK],
    [*_ASK, {"role": "assistant", "content": "hello"}, *_ASK],
)
_HUNGRY = f"takes more than {CPU_S:g} s of computing for a conversation of three turns"
_REMEDY = "Use a template that others can vouch for, or remove it: /v1/completions needs none."


@functools.cache
def check_template(source: str) -> None:
    """Raises StartupError for a template that is broken, that reaches for what it must not have, or that takes more
    memory or time than a short conversation needs. One that refuses our conversations is none of these.
    """
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(
            command, input=json.dumps(source).encode(), capture_output=True, timeout=WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartupError(f"The chat template was not rendered within {WAIT_S:g} s. {_REMEDY}") from None
    if done.returncode < 0:
        raise StartupError(f"The chat template {_HUNGRY}. {_REMEDY}")
    if done.returncode:
        raise StartupError(f"The trial of the chat template failed: {done.stderr.decode(errors='replace')[-300:]}.")
    if why := json.loads(done.stdout):
        raise StartupError(f"{why[0].upper()}{why[1:]}. {_REMEDY}")


def _try(source: str) -> str:
    """Why the template is refused; empty when it is not."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    from diptych.cluster.api.template import TooMuch, compile_template, render

    _limit()
    try:
        template = compile_template(source)
        for turns in _CONVERSATIONS:
            try:
                render(template, turns, {"bos_token": "", "eos_token": ""}, time.process_time)
            except SecurityError as exc:
                return f"the chat template does what no template may: {exc}"
            except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
                continue  # it wants other turns, or tools: a request will be told
    except StartupError as exc:
        return str(exc)
    except TooMuch:
        return "the chat template makes too much text of a short conversation, or takes too long"
    except (MemoryError, RecursionError):
        return f"the chat template takes more than {MEMORY_BYTES >> 20} MiB for a conversation of three turns"
    return ""


def _limit() -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process; RLIMIT_CPU knows whole seconds alone
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    print(json.dumps(_try(json.load(sys.stdin))))
