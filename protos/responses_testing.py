"""What a client of /v1/responses makes of a stream's events, knowing nothing but what they told it; for tests.

Every event that a client could not know how to take is an AssertionError.
"""

from __future__ import annotations

import copy
from typing import Any


class EventReader:
    """Builds a response from its events. `last` is its body, once it ended, `output` what the events said of it."""

    def __init__(self) -> None:
        self.number = 0
        self.states: list[str] = []
        self.output: list[Any] = []
        self.open: Any = None
        self.part: Any = None
        self.last: Any = None

    def take(self, event: dict[str, Any]) -> None:
        """The next event of the stream."""
        event = copy.deepcopy(event)
        assert event["sequence_number"] == self.number
        self.number += 1
        assert self.last is None, "nothing follows the end"
        kind = event["type"].removeprefix("response.")
        if "response" in event:
            self._lifecycle(kind, event["response"])
            return
        assert self.states[-1] == "in_progress"
        if kind == "output_item.added":
            assert self.open is None
            assert event["output_index"] == len(self.output)
            self.open = event["item"]
            assert self.open["status"] == "in_progress"
            return
        assert event["output_index"] == len(self.output)
        if kind == "output_item.done":
            self._item_done(event["item"])
            return
        assert event["item_id"] == self.open["id"]
        getattr(self, "_" + kind.replace(".", "_"))(event)

    def _lifecycle(self, kind: str, body: dict[str, Any]) -> None:
        first = {"created": [], "queued": ["created"]}
        if kind in first:
            assert self.states == first[kind]
        elif kind == "in_progress":
            assert self.states in (["created"], ["created", "queued"])
        else:
            assert (self.open, self.part) == (None, None)
            assert body["status"] == kind
            assert body["output"] == self.output
            self.last = body
        if kind != "created":
            assert body["status"] == kind
        self.states.append(kind)

    def _item_done(self, item: dict[str, Any]) -> None:
        assert self.part is None
        told = {name: value for name, value in self.open.items() if name != "status"}
        assert {name: item[name] for name in told} == told
        assert item["status"] in ("completed", "incomplete")
        self.output.append(item)
        self.open = None

    def _content_part_added(self, event: dict[str, Any]) -> None:
        assert self.part is None
        assert event["content_index"] == len(self.open["content"]) == 0
        assert event["part"]["text"] == ""
        self.part = event["part"]

    def _content_part_done(self, event: dict[str, Any]) -> None:
        assert event["part"] == self.part
        self.open["content"].append(self.part)
        self.part = None

    def _output_text_delta(self, event: dict[str, Any]) -> None:
        assert (self.open["type"], self.part["type"]) == ("message", "output_text")
        self.part["text"] += event["delta"]
        self.part["logprobs"] = self.part["logprobs"] + event["logprobs"]

    def _output_text_done(self, event: dict[str, Any]) -> None:
        assert (event["text"], event["logprobs"]) == (self.part["text"], self.part["logprobs"])

    def _reasoning_text_delta(self, event: dict[str, Any]) -> None:
        assert (self.open["type"], self.part["type"]) == ("reasoning", "reasoning_text")
        self.part["text"] += event["delta"]

    def _reasoning_text_done(self, event: dict[str, Any]) -> None:
        assert event["text"] == self.part["text"]

    def _function_call_arguments_delta(self, event: dict[str, Any]) -> None:
        assert self.open["type"] == "function_call"
        self.open["arguments"] += event["delta"]

    def _function_call_arguments_done(self, event: dict[str, Any]) -> None:
        assert (event["arguments"], event["name"]) == (self.open["arguments"], self.open["name"])
