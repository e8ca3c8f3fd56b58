"""Ledgers, requests and what became of them, for tests of money: an answer token costs a millionth of a dollar."""

from __future__ import annotations

from typing import Any

from diptych.cluster.gateway.books import Books, MemoryBooks
from diptych.cluster.gateway.ledger import Ledger, Reserved
from diptych.cluster.gateway.money_settings import MoneySettings
from diptych.cluster.gateway.ports import Context
from diptych.cluster.gateway.prices import Prices
from diptych.cluster.gateway.record import AttemptRecord, ExchangeRecord
from diptych.cluster.gateway.requests import read_request
from diptych.cluster.gateway.testing import ScriptedTarget
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Usage

MICRO = 1000  # nano-dollars
TARGET = ScriptedTarget("p/a")
PRICES = {"p/a": {"input_per_mtok": 0, "output_per_mtok": 1}}


def settings_of(**given: Any) -> MoneySettings:
    return MoneySettings.model_validate({"prices": PRICES, **given})


def budget_of(micros: float, **given: Any) -> dict[str, Any]:
    return {"all": {"amount_usd": micros * 1e-6, **given}}


def ledger_of(settings: MoneySettings, books: Books | None = None, **given: Any) -> Ledger:
    metrics = given.get("metrics")
    return Ledger(settings, Prices(settings, metrics=metrics), MemoryBooks() if books is None else books, **given)


def asked(max_tokens: int | None = 10, **params: Any) -> ChatRequest:
    most = {} if max_tokens is None else {"max_tokens": max_tokens}
    return read_request("chat", [{"role": "user", "content": "hello"}], {**most, **params})


async def reserve(ledger: Ledger, max_tokens: int = 10, **context: Any) -> Reserved:
    return await ledger.reserve(asked(max_tokens), [TARGET], Context(**context))


def answered(tokens: int, *, target: str = "p/a") -> ExchangeRecord:
    attempt = attempt_of(target, usage=Usage(input_tokens=7, output_tokens=tokens), outcome="answered")
    return ExchangeRecord(model="chat", attempts=[attempt], target=target, outcome="answered")


def attempt_of(target: str = "p/a", **given: Any) -> AttemptRecord:
    return AttemptRecord(target=target, group="chat", cause="first", began_ms=0.0, **given)
