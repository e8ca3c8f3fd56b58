"""Tools and the choice among them become one checked value; every refusal names the place of the fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import parse_chat
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES, ToolUse, read_tools


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def use(**fields: Any) -> ToolUse | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(json.dumps(body).encode()).tool_use


TWO = [tool("f"), tool("g")]


@pytest.mark.parametrize(
    ("choice", "mode", "names", "most"),
    [
        (None, "auto", ("f", "g"), None),
        ("auto", "auto", ("f", "g"), None),
        ("none", "none", (), 0),
        ("required", "required", ("f", "g"), None),
        (named("g"), "required", ("g",), 1),
        (allowed("auto", "g"), "auto", ("g",), None),
        (allowed("required", "g", "f", "g"), "required", ("f", "g"), None),
    ],
)
def test_a_choice_becomes_a_mode_and_names(choice: Any, mode: str, names: tuple[str, ...], most: int | None) -> None:
    found = use(tools=TWO, tool_choice=choice)
    assert found is not None
    assert (found.mode, found.names, found.most_calls) == (mode, names, most)
    assert tuple(entry.name for entry in found.tools) == ("f", "g")
    assert tuple(entry.name for entry in found.allowed) == names
    assert found.is_named == (choice == named("g"))


def test_without_parallel_calls_there_is_one() -> None:
    for parallel, most in ((True, None), (None, None), (False, 1)):
        found = use(tools=TWO, parallel_tool_calls=parallel)
        assert found is not None
        assert found.most_calls == most
        assert found.parallel == (parallel is not False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tool_choice": "none"},
        {"tools": [], "tool_choice": "none"},
        {"parallel_tool_calls": False},
        {"functions": [], "function_call": "none"},
    ],
)
def test_no_tools_are_none(fields: dict[str, Any]) -> None:
    assert use(**fields) is None


def test_functions_are_tools_of_old() -> None:
    found = use(
        functions=[{"name": "f", "description": "d", "parameters": {"type": "object"}}], function_call={"name": "f"}
    )
    assert found is not None
    assert (found.mode, found.names, found.is_legacy, found.is_named, found.most_calls) == (
        "required",
        ("f",),
        True,
        True,
        1,
    )
    found = use(functions=[{"name": "f"}], function_call="auto", tools=None)
    assert found is not None
    assert (found.mode, found.most_calls) == ("auto", 1)


def test_a_tool_is_told_in_openais_shape_with_what_templates_read() -> None:
    schema = {"title": "T", "properties": {"a": {"default": 1, "$ref": "#/$defs/A"}}, "$defs": {"A": {}}}
    found = use(tools=[tool("a.b-c_9", description="", parameters=schema, strict=True), tool("g", parameters={})])
    assert found is not None
    assert found.tools[0].told() == {
        "type": "function",
        "function": {"name": "a.b-c_9", "description": "", "parameters": {"type": "object", **schema}},
    }
    assert found.tools[1].told()["function"] == {"name": "g", "parameters": {"type": "object", "properties": {}}}
    without = use(tools=[tool()])
    assert without is not None
    assert without.tools[0].parameters["additionalProperties"] is False, "a function without parameters takes none"
    for strict in (True, False, None):
        assert use(tools=[tool(strict=strict)]) == use(tools=[tool()])


BIG = {"type": "object", "properties": {"x" * 40_000: {}}}
AT = "tools[0].function"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": {}}, "tools", "list of tools"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools", "limit is 128"),
        ({"tools": ["f"]}, "tools[0]", "must be an object"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type", "is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "must be function"),
        ({"tools": [{"type": "function"}]}, AT, "is missing"),
        ({"tools": [{"type": "function", "name": "f"}]}, AT, "is missing"),
        ({"tools": [{**tool(), "cache": 1}]}, "tools[0].cache", "unknown field"),
        ({"tools": [{"type": "function", "function": {}}]}, f"{AT}.name", "is missing"),
        ({"tools": [tool("a b")]}, f"{AT}.name", "1 to 64 of the characters"),
        ({"tools": [tool("")]}, f"{AT}.name", "1 to 64"),
        ({"tools": [tool("x" * 65)]}, f"{AT}.name", "1 to 64"),
        ({"tools": [tool("f\n")]}, f"{AT}.name", "1 to 64"),
        ({"tools": [tool("\u00f6")]}, f"{AT}.name", "1 to 64"),
        ({"tools": [tool(), tool("g"), tool()]}, "tools[2].function.name", "as tools[0].function.name is"),
        ({"tools": [tool(description=1)]}, f"{AT}.description", "must be a string"),
        ({"tools": [tool(strict="yes")]}, f"{AT}.strict", "true or false"),
        ({"tools": [tool(params={})]}, f"{AT}.params", "unknown field"),
        ({"tools": [tool(parameters=[])]}, f"{AT}.parameters", "must be an object"),
        ({"tools": [tool(parameters={"type": "array"})]}, f"{AT}.parameters.type", "must be object"),
        ({"tools": [tool(parameters={"type": ["object"]})]}, f"{AT}.parameters.type", "must be object"),
        ({"tools": [tool(parameters={"properties": []})]}, f"{AT}.parameters.properties", "must be an object"),
        (
            {"tools": [tool(parameters=BIG), tool("g", parameters=BIG)]},
            "tools[1].function.parameters",
            str(MAX_SCHEMA_BYTES),
        ),
        (
            {"tools": [tool(description="x" * 200_000), tool("g", description="x" * 200_000)]},
            "tools[1].function.description",
            "262144 characters",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "the request has none"),
        ({"tool_choice": named("f")}, "tool_choice", "the request has none"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "the request has none"),
        ({"function_call": "auto"}, "function_call", "the request has none"),
        ({"tools": TWO, "function_call": "auto"}, "function_call", "the request has none"),
        ({"functions": [{"name": "f"}], "tool_choice": "auto"}, "tool_choice", "the request has none"),
        ({"tools": TWO, "functions": [{"name": "f"}]}, "functions", "old name"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call", '"auto" or {"name": ...}'),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name", "none of the request"),
        ({"functions": [{"name": "f", "x": 1}]}, "functions[0].x", "unknown field"),
        ({"tools": TWO, "tool_choice": "any"}, "tool_choice", 'must be "none", "auto", "required"'),
        ({"tools": TWO, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "must have the shape"),
        (
            {"tools": TWO, "tool_choice": named("h")},
            "tool_choice.function.name",
            "none of the request's functions: f, g",
        ),
        ({"tools": TWO, "tool_choice": {**named("f"), "x": 1}}, "tool_choice.x", "unknown field"),
        ({"tools": TWO, "tool_choice": allowed("none", "f")}, "tool_choice.allowed_tools.mode", "auto or required"),
        ({"tools": TWO, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "list of tools"),
        (
            {"tools": TWO, "tool_choice": allowed("auto", "h")},
            "tool_choice.allowed_tools.tools[0].function.name",
            "none of the request's functions",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
    ],
)
def test_a_fault_is_refused_with_its_path(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        use(**fields)
    assert told.value.param == param
    assert words in str(told.value)
    assert param in str(told.value)
    assert len(str(told.value)) < 400


NESTED: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["function", "f", "auto", "required", "allowed_tools", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "function", "name", "parameters", "properties", "tools", "mode", "allowed_tools", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(["tools", "tool_choice", "functions", "function_call"]), NESTED, max_size=3))
def test_nothing_but_a_refusal_or_a_value_comes_of_any_json(fields: dict[str, Any]) -> None:
    """A key or a type that was expected would be an exception of Python, and a 500."""
    try:
        found = read_tools({"tools": [tool()], **fields})
    except InvalidRequest as exc:
        refusal = exc
    else:
        assert found is None or set(found.names) <= {entry.name for entry in found.tools}
        return
    assert refusal.param is not None
    assert refusal.param in str(refusal)
