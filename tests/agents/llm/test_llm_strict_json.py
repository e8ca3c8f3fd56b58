"""What is no JSON is no value: NaN and Infinity are told to the model as mistakes, wherever a type meets an answer.

Guards against a sum that becomes nan because a model of a provider that is held to nothing wrote so.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from diptych.agents import llm
from diptych.agents.llm.testing import ScriptedModel, registry_of, tool_call


class Price(BaseModel):
    dollars: float
    note: str = ""


class Anything(BaseModel):
    model_config = ConfigDict(allow_inf_nan=True)
    number: float


def asking(kind: Any, *answers: str, strict: bool = True) -> tuple[Any, ScriptedModel]:
    model = ScriptedModel(answers)
    retries = llm.Retries(repair=False)
    return llm.call("lab/m", output=kind, registry=registry_of(lab=model), retries=retries, strict=strict)(
        lambda: "go"
    ), model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("kind", "text", "path"),
    [
        (Price, '{"dollars": NaN}', "/dollars"),
        (Price, '{"dollars": -Infinity}', "/dollars"),
        (Price, '{"dollars": 1e999}', "/dollars"),
        (Price, '{"dollars": -1' + "0" * 400 + ".5}", "/dollars"),
        (float, '{"value": Infinity}', "/value"),
        (float, "NaN", ""),
        (list[Price], '{"value": [{"dollars": 1}, {"dollars": NaN}]}', "/value/1/dollars"),
        (dict[str, Any], '{"a": [1, NaN]}', "/a/1"),
        (Decimal, '{"value": NaN}', "/value"),
        (float | str, '{"value": NaN}', "/value"),
    ],
)
def test_it_is_a_mistake_that_the_model_is_told_of(kind: Any, text: str, path: str, strict: bool) -> None:
    call, _ = asking(kind, text, text, text, strict=strict)
    with pytest.raises(llm.InvalidOutput) as caught:
        call()
    assert caught.value.report.paths == (path,)
    assert "finite number" in str(caught.value.report)
    call, model = asking(Price, '{"dollars": NaN}', '{"dollars": 2.5}', strict=strict)
    assert call().value == Price(dollars=2.5)
    assert "write a number that JSON has, without NaN and Infinity" in str(model.requests[1]["messages"][-1])


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Anything, '{"number": Infinity}', Anything(number=float("inf"))),
        (Annotated[float, Field(allow_inf_nan=True)], '{"value": -Infinity}', float("-inf")),
        (Price, '{"dollars": 1e-999, "note": "NaN, 1e999"}', Price(dollars=0, note="NaN, 1e999")),
        (dict[str, int], '{"NaN": 1, "e1000": 2}', {"NaN": 1, "e1000": 2}),
        (Price, '{"dollars": 1.7e308}', Price(dollars=1.7e308)),
        (int, '{"value": 1' + "0" * 400 + "}", 10**400),
    ],
)  # fmt: skip
def test_what_a_type_asks_for_and_what_only_looks_so_is_taken(kind: Any, text: str, value: Any) -> None:
    call, model = asking(kind, text)
    assert call().value == value
    assert len(model.requests) == 1


def test_items_of_a_stream_and_arguments_of_tools_are_read_alike() -> None:
    call, _ = asking(list[Price], '{"value": [{"dollars": 1}, {"dollars": 1e999}]}')
    given = []
    with pytest.raises(llm.InvalidOutput, match="/value/1/dollars: Input should be a finite number"):
        given.extend(call.with_(retries=llm.Retries(attempts=1)).stream().items())
    assert given == [Price(dollars=1)]

    paid = []

    @llm.tool
    def pay(dollars: float) -> None:
        """Pays."""
        paid.append(dollars)

    model = ScriptedModel([tool_call("pay", dollars=float("nan"))])
    reply = llm.call("lab/m", registry=registry_of(lab=model), tools=[pay])(lambda: "go")()
    outcome = reply.run_tools()[0].outcome
    assert isinstance(outcome, llm.Retry)
    assert "/dollars: Input should be a finite number" in outcome.message
    assert paid == []
