"""Calls as lines of JSON, in the form that providers take for fine-tuning: what a large model answers today, a small
one can be taught tomorrow.

A CallLog is a handler of CallEnded: `hooks.on(llm.CallEnded, llm.CallLog("calls.jsonl"))`. `read_log` reads such files,
whoever wrote them. It knows nothing of where calls go.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.protos.messages import Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult

from .errors import CallFailed, UsageError
from .json_text import last_json
from .output import WRAPPED

if TYPE_CHECKING:
    from .hooks import CallEnded
    from .output import Output
    from .reply import Reply

JsonObject = dict[str, Any]
Redact = Callable[[JsonObject], JsonObject | None]


class CallLog:
    """Appends each call that gave a value, or calls of tools, to `path`; failures, cut answers and kept ones are left
    out. A line is `{"messages": [...]}` in OpenAI's form, with `tools` where there were some, and the answer as the
    assistant's last turn: of a typed call, the JSON text of its value as it was checked.

    redact     gets each line before it is written, and gives what is written; None leaves the call out
    with_calls  also tell which function, model, version and how many tokens: in `metadata`
    reasks     also the turns in which a model was told of its errors; else the last answer follows the prompt at once

    Lines are whole also where several threads and processes write one file. What cannot be written raises OSError,
    which the hooks log.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        redact: Redact | None = None,
        with_calls: bool = False,
        reasks: bool = False,
    ) -> None:
        self.path = Path(path)
        self.num_lines = 0
        self._redact = redact
        self._with_calls = with_calls
        self._reasks = reasks
        self._lock = threading.Lock()

    def __call__(self, event: CallEnded) -> None:
        """For `hooks.on(CallEnded, ...)`."""
        reply = event.reply
        if reply is None or reply.finish not in ("stop", "tool_calls") or reply.is_cached:
            return
        line = self.line(reply, reply.draft.messages if self._reasks else event.draft.messages)
        told = line if self._redact is None else self._redact(line)
        if told is None:
            return
        self._append((json.dumps(told, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8", "replace"))

    def line(self, reply: Reply[Any], prompt: Sequence[Message]) -> JsonObject:
        """What is written of a reply to `prompt`, before `redact`."""
        last = _turn(reply.answer.message)
        if reply.draft.output is not None and not reply.tool_calls:
            last["content"] = _document(reply.draft.output, reply)
        told: JsonObject = {"messages": [*(turn for message in prompt for turn in _turns(message)), last]}
        if reply.draft.tools:
            told["tools"] = [tool.told() for tool in reply.draft.tools]
        if self._with_calls:
            spent = reply.spent
            told["metadata"] = {
                "function": reply.draft.name,
                "version": reply.draft.version,
                "model": reply.model,
                "attempts": len(reply.attempts),
                "input_tokens": spent.input_tokens,
                "output_tokens": spent.output_tokens,
            }
        return told

    def _append(self, line: bytes) -> None:
        """In one write to a file that is open for appending: the system puts such lines behind one another."""
        with self._lock:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                written = os.write(file, line)
                if written != len(line):
                    raise OSError(f"{self.path}: {written} of {len(line)} bytes were written: is the disk full?")
            finally:
                os.close(file)
            self.num_lines += 1


def _document(output: Output[Any], reply: Reply[Any]) -> str:
    """The value as JSON; where its type does not take back what it gives, the JSON of the answer."""
    said = last_json(reply.text)
    try:
        written = output.adapter.dump_json(reply.value, by_alias=True).decode()
        output.adapter.validate_json(written, context=reply.draft.validation)
    except (CallFailed, ValueError, RecursionError):  # pydantic's errors are of ValueError
        return said
    return f'{{"{WRAPPED}":{written}}}' if output.is_wrapped else written


def _turns(message: Message) -> list[JsonObject]:
    results = [part for part in message.parts if isinstance(part, ToolResult)]
    if not results:
        return [_turn(message)]
    return [
        {
            "role": "tool",
            "tool_call_id": result.call_id,
            "content": "".join(part.text for part in result.parts if isinstance(part, Text)),
        }
        for result in results
    ]


def _turn(message: Message) -> JsonObject:
    turn: JsonObject = {"role": message.role}
    if message.media:
        turn["content"] = [found for part in message.parts if (found := _part(part)) is not None]
    else:
        turn["content"] = message.content or (None if message.tool_calls else "")
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    if message.name:
        turn["name"] = message.name
    return turn


def _arguments(call: ToolCall) -> str:
    return call.text or json.dumps(call.arguments, ensure_ascii=False)


def _part(part: object) -> JsonObject | None:
    match part:
        case Text() | Refusal():
            return {"type": "text", "text": part.text}
        case Media(kind="image"):
            url = part.url or f"data:{part.media_type or 'image/png'};base64,{part.data}"
            return {"type": "image_url", "image_url": {"url": url}}
        case Media(kind="audio"):
            form = part.media_type.partition("/")[2] or "wav"
            return {"type": "input_audio", "input_audio": {"data": part.data, "format": form}}
        case Media():
            file = {"file_id": part.file_id} if part.file_id else {"filename": part.name, "file_data": part.data}
            return {"type": "file", "file": file}
        case Reasoning():  # it has no place in this form
            return None
    return None


def read_log(path: str | os.PathLike[str]) -> Iterator[JsonObject]:
    """The lines of such a file, one by one; empty ones are passed over. Raises UsageError that names the line which is
    no call, OSError.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                found = json.loads(text)
            except ValueError as exc:
                raise UsageError(f"{path}, line {number}: this is no JSON: {exc}") from exc
            turns = found.get("messages") if isinstance(found, Mapping) else None
            if not isinstance(turns, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
                raise UsageError(
                    f"{path}, line {number}: a call is an object with a list of messages, each with a role"
                )
            yield found
