"""A conversation as chat templates read it, and what is changed where a template cannot say it as it is.

render.py calls it. Nothing of a conversation is lost: what a template has no form for becomes text in a turn that it
has a form for, in the words that stand here. A text that moves is set apart by an empty line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from diptych.protos.messages import Message, ToolCall
from diptych.protos.openai_tools import Tool, ToolUse

from .template_facts import TemplateFacts, in_parts

Turn = dict[str, Any]
_SYSTEM = ("system", "developer")
MAX_LOOKED_UP = 8
_PLAIN = re.compile(r"[^\W_][\w ]*")
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")  # the only ids that Mistral's templates take


class Arguments(dict[str, Any]):
    """A call's arguments: an object to templates that look into it or write it with tojson; to those that join it to a
    text, as DeepSeek's do, the client's own JSON.
    """

    __slots__ = ("_json",)  # no name without underscore: it would hide an argument of that name from templates

    def __init__(self, call: ToolCall) -> None:
        super().__init__(call.arguments)
        self._json = call.text

    def __str__(self) -> str:
        return self._json

    def __add__(self, other: str) -> str:
        return self._json + other

    def __radd__(self, other: str) -> str:
        return other + self._json


def turns_of(messages: Sequence[Message], facts: TemplateFacts) -> list[Turn]:
    """The messages as transformers would pass them, as far as the template knows of calls, results and developers."""
    turns: list[Turn] = []
    for role, group in itertools.groupby(messages, key=lambda message: message.role):
        if role == "tool" and not facts.knows_results:
            results = [_result_in_words(message) for message in group]
            turns.append({"role": "user", "content": _paragraphs(results)})
        else:
            turns += [_turn(message, facts) for message in group]
    return turns


def _turn(message: Message, facts: TemplateFacts) -> Turn:
    role: str = message.role
    if role == "developer" and not facts.knows_developer:
        role = "system"
    turn: Turn = {"role": role, "content": _content(message)}
    if (result := message.result) is not None:
        turn |= {"name": result.name, "tool_call_id": result.call_id}
    for name in ("name", "refusal"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    if message.reasoning_content is not None:
        turn |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning_content)
    if not message.tool_calls:
        return turn
    if not facts.knows_calls:
        turn["content"] = _paragraphs([message.content, calls_in_words(message.tool_calls)])
        return turn
    if facts.asks_for_none and not message.content:
        turn["content"] = None
    turn["tool_calls"] = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": Arguments(call)}}
        for call in message.tool_calls
    ]
    return turn


def _result_in_words(message: Message) -> str:
    result = message.result
    assert result is not None
    return f"Result of {result.name} ({result.call_id}):\n{_content(message)}"


def _content(message: Message) -> str:
    """Templates have no word for a call that failed."""
    failed = message.result is not None and message.result.is_error
    return f"The call failed:\n{message.content}" if failed else message.content


def calls_in_words(calls: Sequence[ToolCall]) -> str:
    """The generic form of calls: one is an object of name and arguments, several are a list of such."""
    objects = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.text}}}' for call in calls]
    return objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]"


def tools_in_words(use: ToolUse) -> str:
    """What a model whose template knows nothing of tools is told of them, for its system message."""
    lines = ["You can call these functions:", *(_in_words(tool) for tool in use.tools), ""]
    shape = '{"name": the function\'s name, "arguments": an object by its parameters}'
    if use.mode == "auto":
        lines.append(f"To call one, answer with nothing but this JSON: {shape}")
    else:
        lines.append(f"Answer with a call, which is nothing but this JSON: {shape}")
    if use.most_calls is None:
        lines.append("To call several, answer with a JSON list of such objects.")
    if len(use.names) < len(use.tools):
        lines.append(f"Now only these may be called: {', '.join(use.names)}.")
    return "\n".join(lines)


def _in_words(tool: Tool) -> str:
    return json.dumps(tool.told()["function"], ensure_ascii=False)


def with_instruction(turns: Sequence[Turn], text: str) -> list[Turn]:
    """`text` at the end of the first system turn; where there is none, as a system turn at the start."""
    for place, turn in enumerate(turns):
        if _is_system(turn):
            changed = {**turn, "content": _paragraphs([turn["content"], text])}
            return [*turns[:place], changed, *turns[place + 1 :]]
    return [{"role": "system", "content": text}, *turns]


def attempts(turns: list[Turn], tools: Sequence[Tool], facts: TemplateFacts) -> Iterator[tuple[list[Turn], list[Turn]]]:
    """The conversation and its tools as they are, then changed more and more, for templates that refuse what came
    before, or leave a system message out: ids of nine characters, no content that is none and no tool without a
    description; then no system message but the first, no two turns of a role in a row; then no system message at all.
    What changes nothing is left out.
    """
    told = [tool.told() for tool in tools]
    yield _shaped(turns, facts), told
    described = [
        {**entry, "function": {**entry["function"], "description": entry["function"].get("description", "")}}
        for entry in told
    ]
    plain = [_plain(turn) for turn in turns]
    if plain != turns or described != told:
        yield _shaped(plain, facts), described
    merged = _merged(_without_later_system(plain))
    if merged != plain:
        yield _shaped(merged, facts), described
    bare = _merged(_without_system(plain))
    if bare != merged:
        yield _shaped(bare, facts), described


def is_system_told(turns: Sequence[Turn], text: str, others: str) -> bool | None:
    """Whether the system turns among `turns` are in the rendering `text`; of many, the first few stand for all. A text
    counts by its longest run of plain characters, since a template may escape the others. None where that cannot be
    seen: the run is also in `others`, which is all else that the template may have written, or in two system turns.
    """
    told = [_text(turn)[:256] for turn in itertools.islice(filter(_is_system, turns), MAX_LOOKED_UP)]
    runs = [max(plain, key=len).strip() for plain in map(_PLAIN.findall, told) if plain]
    if any(run not in text for run in runs):
        return False
    return None if any(run in others or sum(run in one for one in told) > 1 for run in runs) else True


def without_system(turns: Sequence[Turn]) -> list[Turn]:
    """The turns that are not the system's."""
    return [turn for turn in turns if not _is_system(turn)]


def with_marks(turns: Sequence[Turn], mark: str) -> tuple[list[Turn], list[str]]:
    """The turns with a word in place of each system turn's text, and those words; `mark` begins them."""
    words: list[str] = []
    found: list[Turn] = []
    for turn in turns:
        if _is_system(turn):
            words.append(f"{mark}{len(words)}end")
            content = words[-1] if isinstance(turn["content"], str) else in_parts(words[-1])
            turn = {**turn, "content": content}
        found.append(turn)
    return found, words


def _text(turn: Turn) -> str:
    content = turn["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def _shaped(turns: list[Turn], facts: TemplateFacts) -> list[Turn]:
    if not facts.takes_parts:
        return turns
    return [turn if turn["content"] is None else {**turn, "content": in_parts(turn["content"])} for turn in turns]


def _plain(turn: Turn) -> Turn:
    changed = {**turn, "content": turn["content"] or ""}
    if "tool_call_id" in turn:
        changed["tool_call_id"] = _short_id(turn["tool_call_id"])
    if "tool_calls" in turn:
        changed["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in turn["tool_calls"]]
    return changed


def _short_id(call_id: str) -> str:
    return call_id if _SHORT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _without_later_system(turns: Sequence[Turn]) -> list[Turn]:
    """System turns at the start become one; a later one goes to the front of the user turn right behind it, else to
    the end of the one right before it. After an assistant's text it becomes a user turn; amid calls and their results,
    where no user speaks, it goes to the end of the last user turn before.
    """
    found: list[Turn] = []
    texts: list[list[str]] = []  # of each turn found, joined at the end: many short ones must not be copied often
    last_user = -1
    groups = [(of_system, list(run)) for of_system, run in itertools.groupby(turns, key=_is_system)]
    for place, (of_system, run) in enumerate(groups):
        if not of_system:
            last_user = max(
                (len(found) + at for at, turn in enumerate(run) if turn["role"] == "user"), default=last_user
            )
            found += run
            texts += [[turn["content"]] for turn in run]
            continue
        words = [turn["content"] for turn in run]
        behind = groups[place + 1][1] if place + 1 < len(groups) else []
        if not found:
            found.append(run[0])
            texts.append(words)
        elif behind and behind[0]["role"] == "user":
            behind[0] = {**behind[0], "content": _paragraphs([*words, behind[0]["content"]])}
        elif last_user < 0 or (found[-1]["role"] == "assistant" and not found[-1].get("tool_calls")):
            last_user = len(found)
            found.append({"role": "user"})
            texts.append(words)
        else:
            texts[last_user] += words
    return [
        turn if len(own) == 1 and "content" in turn else {**turn, "content": _paragraphs(own)}
        for turn, own in zip(found, texts, strict=True)
    ]


def _is_system(turn: Turn) -> bool:
    return turn["role"] in _SYSTEM


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """The system turn that is left at the start goes to the front of the first user turn; where there is none, it
    becomes one.
    """
    found = _without_later_system(turns)
    if not found or not _is_system(found[0]):
        return found
    text, rest = found[0]["content"], found[1:]
    for place, turn in enumerate(rest):
        if turn["role"] == "user":
            rest[place] = {**turn, "content": _paragraphs([text, turn["content"]])}
            return rest
    return [{"role": "user", "content": text}, *rest]


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbouring turns of the user, and of the assistant, as one each; not those with calls, as some templates write
    either the calls of a turn or its text.
    """
    found: list[Turn] = []
    for (role, has_calls), group in itertools.groupby(turns, key=lambda turn: (turn["role"], "tool_calls" in turn)):
        run = list(group)
        if len(run) == 1 or has_calls or role not in ("user", "assistant"):
            found += run
            continue
        merged: Turn = {"role": role}
        for turn in run:
            merged |= turn
        merged["content"] = _paragraphs(turn["content"] for turn in run)
        found.append(merged)
    return found


def _paragraphs(texts: Iterable[str | None]) -> str:
    return "\n\n".join(text for text in texts if text)
