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
_ASK: dict[str, object] = {"role": "user", "content": "hello"}
_TOOLS: list[dict[str, object]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
        },
    }
]
_CALL: dict[str, object] = {
    "type": "function",
    "id": "abcdefgh1",
    "function": {"name": "look", "arguments": {"at": "it"}},
}
_CONVERSATIONS: tuple[tuple[list[dict[str, object]], list[dict[str, object]] | None], ...] = (
    ([_ASK], None),
    ([{"role": "system", "content": "be brief"}, _ASK], None),
    ([_ASK, {"role": "assistant", "content": "hello", "reasoning_content": "well"}, _ASK], None),
    ([_ASK], _TOOLS),
    (
        [
            _ASK,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "seen", "tool_call_id": "abcdefgh1", "name": "look"},
        ],
        _TOOLS,
    ),
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
    from jinja2.exceptions import SecurityError

    from diptych.cluster.api.template import REFUSALS, Budget, TooMuch, compile_template, render, template_data

    _limit()
    try:
        template = compile_template(source)
        for turns, tools in _CONVERSATIONS:
            data = template_data(turns, {"bos_token": "", "eos_token": ""}, tools=tools)
            try:
                render(template, data, Budget(len(str(data)), time.process_time))
            except SecurityError as exc:
                return f"the chat template does what no template may: {exc}"
            except REFUSALS:
                continue  # it wants other turns: a request will be told
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
