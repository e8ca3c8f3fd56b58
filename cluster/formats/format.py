"""The formats in which models write reasoning and tool calls, as data: markers, shapes, literal texts.

The parser reads by them, `calls.py` writes by them, `detect.py` chooses among them. A new format of the same shapes is
one more entry here. Nothing here looks at a model or at a text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# DeepSeek's markers have U+FF5C for bars and U+2581 for gaps.
CALLS_BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
CALLS_END = "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL_BEGIN = "<\uff5ctool\u2581call\u2581begin\uff5c>"
CALL_END = "<\uff5ctool\u2581call\u2581end\uff5c>"
CALL_SEP = "<\uff5ctool\u2581sep\uff5c>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How calls are written, literally:

        lead  before_name NAME after_name {...} suffix  separator  before_name NAME after_name {...} suffix  end

    `lead_in_text` stands for `lead` where text comes first: the trigger is in it or begins `before_name`.
    """

    before_name: str
    after_name: str
    suffix: str = ""
    lead: str = ""
    lead_in_text: str = ""
    separator: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a model writes tool calls.

    A call begins at one of `triggers`, or at one of the characters of `bare` as the first of the answer. Then comes a
    JSON object with the name and the arguments, or a list of such (`has_objects`), or the bare name, which ends at one
    of `name_ends` or at a brace (`brace_ends_name`), and the JSON value of its arguments.
    """

    name: str
    writing: Writing
    triggers: tuple[str, ...] = ()  # the first one is what `calls.py` writes
    ends: tuple[str, ...] = ()  # markers after a call, dropped; one amid the arguments, outside strings, ends the call
    bare: str = ""
    has_objects: bool = True
    separators: str = ""  # characters that may stand between two objects
    outer: str = ""  # a trigger that only opens a list of calls: another trigger has to follow
    name_ends: tuple[str, ...] = ()
    id_begin: str = ""  # one of `name_ends` after which an id stands, up to another of them
    brace_ends_name: bool = False
    type_word: str = ""  # where this stands for the name and no arguments follow, the name comes after it
    is_fenced: bool = False  # a code fence may stand around the arguments

    @property
    def markers(self) -> frozenset[str]:
        """Every marker of the format."""
        return frozenset((*self.triggers, *self.ends, *self.name_ends))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model sets its reasoning apart: between two markers, before the answer."""

    name: str
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class Format:
    """How one model writes; None for what it does not write."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @property
    def markers(self) -> frozenset[str]:
        """All marker strings, to be kept visible where the tokenizer has them as special tokens."""
        found = self.tools.markers if self.tools else frozenset()
        return found | {self.reasoning.start, self.reasoning.end} if self.reasoning else found


def _object(key: str) -> tuple[str, str]:
    return '{"name": "', f'", "{key}": '


_ARGUMENTS, _PARAMETERS = _object("arguments"), _object("parameters")

# Hermes 2 and 3, Qwen 2.5 and 3, SmolLM: every call in tags of its own.
HERMES = ToolFormat(
    name="hermes",
    triggers=("<tool_call>",),
    ends=("</tool_call>",),
    separators=",",
    writing=Writing(
        before_name="<tool_call>\n" + _ARGUMENTS[0],
        after_name=_ARGUMENTS[1],
        suffix="}\n</tool_call>",
        separator="\n",
    ),
)
# Llama 3.1 to 3.3: a bare object, with the tag in front of it at times.
LLAMA3 = ToolFormat(
    name="llama3",
    triggers=("<|python_tag|>",),
    bare="{",
    separators=";,",
    writing=Writing(
        before_name=_PARAMETERS[0],
        after_name=_PARAMETERS[1],
        suffix="}",
        lead_in_text="<|python_tag|>",
        separator="; ",
    ),
)
# Tokenizers from version 11 on: the marker before each name.
MISTRAL = ToolFormat(
    name="mistral",
    triggers=("[TOOL_CALLS]",),
    separators=",",
    name_ends=("[ARGS]", "[CALL_ID]"),
    id_begin="[CALL_ID]",
    brace_ends_name=True,
    writing=Writing(before_name="[TOOL_CALLS]", after_name="[ARGS]"),
)
# Tokenizers before: one list of objects. Read like the newer one.
MISTRAL_LIST = replace(
    MISTRAL,
    name="mistral-list",
    writing=Writing(
        before_name=_ARGUMENTS[0],
        after_name=_ARGUMENTS[1],
        suffix="}",
        lead="[TOOL_CALLS] [",
        lead_in_text="[TOOL_CALLS] [",
        separator=", ",
        end="]",
    ),
)
# DeepSeek V3.1.
DEEPSEEK = ToolFormat(
    name="deepseek",
    triggers=(CALLS_BEGIN, CALL_BEGIN),
    ends=(CALL_END, CALLS_END),
    has_objects=False,
    outer=CALLS_BEGIN,
    name_ends=(CALL_SEP,),
    type_word="function",
    is_fenced=True,
    writing=Writing(
        before_name=CALL_BEGIN,
        after_name=CALL_SEP,
        suffix=CALL_END,
        lead=CALLS_BEGIN,
        lead_in_text=CALLS_BEGIN,
        end=CALLS_END,
    ),
)
# DeepSeek V3 and R1: the type, then the name, then the arguments in a fence. Read like the newer one.
DEEPSEEK_V3 = replace(
    DEEPSEEK,
    name="deepseek-v3",
    writing=Writing(
        before_name=CALL_BEGIN + "function" + CALL_SEP,
        after_name="\n```json\n",
        suffix="\n```" + CALL_END,
        lead=CALLS_BEGIN,
        lead_in_text=CALLS_BEGIN,
        separator="\n",
        end=CALLS_END,
    ),
)
# For models that learned no format: the whole answer is the call, or a list of calls.
JSON = ToolFormat(
    name="json",
    bare="{[",
    separators=";,",
    writing=Writing(before_name=_ARGUMENTS[0], after_name=_ARGUMENTS[1], suffix="}", lead="[", separator=", ", end="]"),
)

TOOL_FORMATS = {f.name: f for f in (HERMES, LLAMA3, MISTRAL, MISTRAL_LIST, DEEPSEEK, DEEPSEEK_V3, JSON)}
REASONING_FORMATS = {
    f.name: f
    for f in (
        ReasoningFormat("think", "<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron, SmolLM3, and most others
        ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
        ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
        ReasoningFormat("exaone", "<thought>", "</thought>"),
        ReasoningFormat("kimi", "\u25c1think\u25b7", "\u25c1/think\u25b7"),
        ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
    )
}
