"""A model that needs no script: it repeats the question, or gives the smallest answer that the result's type takes."""

from __future__ import annotations

import json
from typing import Any

from diptych.protos.replies import Usage

from .bodies import has_outcomes, last_text, schema_of, tools_of
from .minimal import minimal, minimal_text
from .scripted import Said, ScriptedModel

JsonObject = dict[str, Any]


class EchoModel(ScriptedModel):
    """Answers each request at once: with the text of the user's last turn; a typed call with the smallest instance of
    its schema. `calls_tools`: where tools are offered and none has answered yet, each is called once with the smallest
    arguments. Usage counts words. `then` and `requests` are those of a ScriptedModel.
    """

    def __init__(self, name: str = "echo", *, calls_tools: bool = False) -> None:
        super().__init__((), name=name, then=_calling if calls_tools else echoed)


def echoed(body: JsonObject) -> Said:
    """The echo of a request; an entry of a script, too. Raises NoMinimal where no instance of its schema is known."""
    asked = last_text(body)
    schema = schema_of(body)
    text = asked if schema is None else minimal_text(schema)
    usage = Usage(input_tokens=len(json.dumps(body).split()), output_tokens=len(text.split()))
    return Said(text=text or "...", usage=usage)


def _calling(body: JsonObject) -> Said:
    tools = tools_of(body)
    if not tools or body.get("tool_choice") == "none" or has_outcomes(body):
        return echoed(body)
    return Said(calls=tuple((name, minimal(schema or {"type": "object"})) for name, schema in tools.items()))
