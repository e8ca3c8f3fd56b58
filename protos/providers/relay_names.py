"""Events of OpenAI's chat format as they pass: a provider's id, model and words in them become those that the client
knows, at the price of looking for a few bytes. What is said in another way than the event before is written anew.

openai_relay.py calls it for each event that it passes on. It decides nothing about the answer.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from .codec import JsonObject
from .openai_chat_stream import finish_of

_CALLS: Final = re.compile(rb'"tool_calls"\s*:\s*\[\s*\{')
_FINISH: Final = re.compile(rb'("finish_reason"\s*:\s*)"([^"\\]*)"')
_NOT_YET: Final = b"\0"  # is in no event


class Names:
    """Of one stream. `id` and `model` are what the client sees; `reasoning_field` is the provider's name for reasoning,
    which clients read as reasoning_content.

    has_calls   a tool call has passed
    """

    def __init__(self, *, id: str, model: str, reasoning_field: str = "reasoning_content") -> None:
        self.has_calls = False
        self._ours = {"id": id, "model": model}
        self._id = self._model = (_NOT_YET, b"")  # theirs, ours
        is_other = reasoning_field not in ("", "reasoning_content")
        self._reasoning = f'"{reasoning_field}":'.encode() if is_other else b""
        self._reasoning_field = reasoning_field

    def __call__(self, block: bytes) -> bytes:
        """The event as the client gets it; empty for one that holds no chunk: a ping, the last line [DONE]."""
        # Before its choices a chunk says no more than its names; most providers write them there.
        end = block.find(b'"choices":')
        head = block[:end]
        if end < 0 or self._id[0] not in head or self._model[0] not in head or not head.startswith(b"data: {"):
            return self._anew(block)
        block = head.replace(*self._id, 1).replace(*self._model, 1) + block[end:]
        if self._reasoning and self._reasoning in block:
            block = block.replace(self._reasoning, b'"reasoning_content":', 1)
        return self._checked(block)

    def _checked(self, block: bytes) -> bytes:
        if b'"tool_calls"' in block and not self.has_calls:
            self.has_calls = _CALLS.search(block) is not None
        if b'"finish_reason":null' in block or b'"finish_reason": null' in block:
            return block
        return _FINISH.sub(self._finish, block, count=1)

    def _finish(self, found: re.Match[bytes]) -> bytes:
        native = found[2].decode("utf-8", "replace")
        return found[1] + f'"{finish_of(native, has_calls=self.has_calls)}"'.encode() if native else found[0]

    def _anew(self, block: bytes) -> bytes:
        lines = [line[5:].strip() for line in block.splitlines() if line.startswith(b"data:")]
        try:
            chunk = json.loads(b"\n".join(lines))
        except (ValueError, RecursionError):
            return b""
        if not isinstance(chunk, dict):
            return b""
        self._id = self._learned(block, chunk, "id")
        self._model = self._learned(block, chunk, "model")
        made: JsonObject = {**chunk, **self._ours}
        if self._reasoning and isinstance(choices := chunk.get("choices"), list):
            made["choices"] = [self._with_reasoning(choice) for choice in choices]
        return self._checked(b"data: " + json.dumps(made, separators=(",", ":")).encode() + b"\n\n")

    def _learned(self, block: bytes, chunk: JsonObject, name: str) -> tuple[bytes, bytes]:
        """The provider's way to write the field, and what to write in its place. An empty name is nobody's alone."""
        theirs = chunk.get(name)
        if isinstance(theirs, str) and theirs:
            for said in (json.dumps(theirs), json.dumps(theirs, ensure_ascii=False)):
                for space in ("", " "):
                    written = f'"{name}":{space}{said}'.encode(errors="replace")
                    if written in block:
                        return written, f'"{name}":{json.dumps(self._ours[name])}'.encode()
        return _NOT_YET, b""

    def _with_reasoning(self, choice: Any) -> Any:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict) or self._reasoning_field not in delta:
            return choice
        others = {key: value for key, value in delta.items() if key != self._reasoning_field}
        return {**choice, "delta": {**others, "reasoning_content": delta[self._reasoning_field]}}
