"""Routes of the gateway: the headers that change what a route does with a request, and its dry run."""

from __future__ import annotations

from typing import get_args

from diptych.cluster.api.overrides import Caching
from diptych.cluster.gateway.rule_settings import StrategyName

from .answers import COUNT, answer
from .chat import CHAT
from .generation import SESSION
from .shapes import Field, Operation, Reply, many, nullable, number, one_of, tells, text, told

_MAY = "where the key lets it"
WISHES = (
    Field(name="x-route-target", schema=text(3, 320), words=f"PROVIDER/MODEL or pool/MODEL that answers alone, {_MAY}"),
    Field(name="x-route-strategy", schema=one_of(*get_args(StrategyName)), words=f"instead of the route's own, {_MAY}"),
    Field(name="x-cache", schema=one_of(*get_args(Caching)), words=f"how kept answers are used, {_MAY}"),
)
_OPERATOR = "for an admin's key"
VERDICT = answer(
    "RouteVerdict",
    "A rule that was asked.",
    told("rule", text(1)),
    told("outcome", one_of("decides", "does not hold", "not drawn")),
    told("condition", text(), "the first that does not hold"),
    tells("words", text(), f"what it wants; {_OPERATOR}"),
)
ESTIMATE = answer(
    "RouteEstimate",
    "What the request would cost in US dollars, with an answer as long as it may become.",
    told("dollars", number(0)),
    told("input_per_mtok", number(0), "for a million tokens"),
    told("output_per_mtok", number(0), "likewise"),
    told("source", one_of("override", "table", "devices", "assumed")),
)
CANDIDATE = answer(
    "RouteCandidate",
    "A target.",
    told("target", text(1)),
    told("group", text(1), "the route, or the fallback, that it stands in"),
    told("state", one_of("closed", "open", "half_open"), "of its breaker"),
    told("excluded", text(), "why it would not be asked; empty: it would"),
    told("cost", nullable(ESTIMATE.ref), "null: nobody knows its price"),
    tells("weight", number(0), _OPERATOR),
    tells("score", nullable(number()), f"the lower the better; {_OPERATOR}"),
    tells("in_flight", COUNT, _OPERATOR),
    tells("latency_ms", nullable(number(0)), _OPERATOR),
)
STANDING = answer(
    "RouteBudget",
    "A budget that the request falls under.",
    told("budget", text(1)),
    told("left", nullable(number(0, 1)), "part of its amount; null: this router does not know yet"),
    told("refuses", text(), "why it would refuse the request; empty: it would not"),
    tells("scope", text(), f"whose account; {_OPERATOR}"),
)
EXPLANATION = answer(
    "RouteExplanation",
    "Where a request would go now. Chance is left out: p2c, weighted and a canary at random may choose otherwise.",
    told("object", one_of("route.explanation")),
    told("model", text(1), "that was asked for"),
    told("group", text(1), "the route that answers"),
    told("rule", text(), "that decided; empty: none"),
    told("rules", many(VERDICT.ref), "that were asked, in order"),
    told("strategy", text()),
    told("target", text(), "the most likely one; empty: none can be asked"),
    told("why", text(1)),
    told("candidates", many(CANDIDATE.ref), "in the order in which they would be tried"),
    told("budgets", many(STANDING.ref)),
    told("input_tokens", COUNT, "estimated by bytes"),
    told("output_tokens", COUNT, "at most"),
)

OPERATIONS = (
    Operation(
        id="explainRoute",
        method="POST",
        path="/v1/route/explain",
        tag="Routing",
        words="where a chat request would go, why not elsewhere, and what it would cost; nothing is sent",
        scope="any key",
        body=CHAT,
        headers=(SESSION, *WISHES),
        query=(
            Field(name="tenant", schema=text(1, 128), words=f"ask as this tenant; {_OPERATOR}"),
            Field(name="key", schema=text(1, 128), words=f"as this key, by its id; {_OPERATOR}"),
            Field(name="session", schema=text(1, 128), words=f"in this session; {_OPERATOR}"),
            Field(name="tag", schema=text(1, 128), words=f"with this tag; may be repeated; {_OPERATOR}"),
        ),
        replies=(Reply(status=200, words="the explanation", media={"application/json": EXPLANATION.ref}),),
        errors=frozenset({400, 403, 404, 408, 413}),
    ),
)
