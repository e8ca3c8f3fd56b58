"""How a call is written in a format, as literal pieces around the JSON text of its arguments.

    lead  prefix(name) {...} suffix  separator  prefix(name) {...} suffix  end

The builder of grammars makes a model write them; what is written is read back by the parser. Arguments are not checked.
"""

from __future__ import annotations

import json

from diptych.cluster.formats.format import ToolFormat
from diptych.cluster.formats.reader import MAX_NAME, is_plain_name


def trigger(format: ToolFormat) -> str | None:
    """The marker by which free text turns into a call; None where a call is the whole answer or nothing.

    `lead(format, in_text=True) + prefix(format, name)` begins with it.
    """
    return format.triggers[0] if format.triggers else None


def lead(format: ToolFormat, *, in_text: bool = False) -> str:
    """What stands before the first call. `in_text`: where the model chose between text and a call by the trigger."""
    return format.writing.lead_in_text if in_text else format.writing.lead


def prefix(format: ToolFormat, name: str) -> str:
    """What stands directly before the arguments of a call of `name`.

    ValueError for a name that the format cannot carry: an empty one, a very long one, and, where it is written without
    quotes, one with white space, quotes or brackets. Names by OpenAI's rule ([a-zA-Z0-9_-]{1,64}) always can be.
    """
    if '"' in format.writing.before_name:
        written = json.dumps(name, ensure_ascii=False)[1:-1]
        possible = 0 < len(written) <= MAX_NAME
    else:
        written, possible = name, is_plain_name(name)
    if not possible:
        raise ValueError(f"{name[:80]!r} cannot be written as a tool's name in the format {format.name}")
    return format.writing.before_name + written + format.writing.after_name


def suffix(format: ToolFormat) -> str:
    """What stands directly after the arguments of a call."""
    return format.writing.suffix


def separator(format: ToolFormat) -> str:
    """What stands between two calls."""
    return format.writing.separator


def end(format: ToolFormat) -> str:
    """What stands after the last call."""
    return format.writing.end


def write_call(format: ToolFormat, name: str, arguments_json: str) -> str:
    """An answer that is one call. ValueError as of `prefix`."""
    return write_calls(format, [(name, arguments_json)])


def write_calls(format: ToolFormat, calls: list[tuple[str, str]], *, in_text: bool = False) -> str:
    """Several calls (name, JSON text of the arguments), one after another. ValueError as of `prefix`."""
    written = [prefix(format, name) + arguments + suffix(format) for name, arguments in calls]
    return lead(format, in_text=in_text) + separator(format).join(written) + end(format)
