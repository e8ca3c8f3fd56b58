"""The rules of `gateway:` in diptych.yaml: which requests are answered otherwise than their `model` says.

Embedded by settings.py, which calls `check_rules` with the routes; rules.py acts by them. What can never happen is a
mistake here: a condition that nothing meets, a route that is not there, a rule behind one that takes everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from diptych.protos.settings import Settings

StrategyName = Literal["p2c", "weighted", "priority", "lowest_cost", "sticky"]
Medium = Literal["image", "audio", "document"]
MAX_RULES: Final = 256
HEADER: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
# What the front door has looked at already: a rule by one of these would believe the client instead of its key.
AUTHENTICATION: Final = frozenset(
    {
        "authorization",
        "cookie",
        "forwarded",
        "host",
        "proxy-authorization",
        "x-api-key",
        "x-cache",
        "x-forwarded-for",
        "x-real-ip",
        "x-route-strategy",
        "x-route-target",
        "x-session-id",
        "x-tenant",
    }
)
_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}/(\*|[^\s/*][^\s*]{0,255})")
_RULE: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    BeforeValidator(_listed),
    Field(min_length=1, max_length=256),
]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class TokenSpan(Settings):
    """Tokens of the prompt, as the gateway estimates them: a token for four bytes of text, 1,600 for an image."""

    above: int | None = Field(None, ge=0, description="more than this")
    below: int | None = Field(None, ge=1, description="fewer than this")

    @model_validator(mode="after")
    def _holds_something(self) -> TokenSpan:
        _check_span(self.above, self.below)
        if self.above is not None and self.below is not None and self.below - self.above < 2:
            raise ValueError(f"no number of tokens is above {self.above} and below {self.below}")
        return self


class BudgetSpan(Settings):
    """What is left of budgets, as far as this router knows: a part of the amount, between 0 and 1."""

    budget: str | None = Field(None, description="a name of gateway.budgets; null: the one with the least left")
    above: float | None = Field(None, ge=0, lt=1, description="more than this part is left")
    below: float | None = Field(None, gt=0, le=1, description="less than this part is left")

    @model_validator(mode="after")
    def _holds_something(self) -> BudgetSpan:
        _check_span(self.above, self.below)
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"nothing is above {self.above:g} and below {self.below:g}")
        return self


def _check_span(above: float | None, below: float | None) -> None:
    if above is None and below is None:
        raise ValueError("it says neither above nor below; give one of them, or both")


class WhenSettings(Settings):
    """Conditions, all of which must hold; of a list of names one must. None: every request."""

    tenant: Names | None = Field(None, description="of the key")
    key: Names | None = Field(None, description="id of the API key")
    tag: Names | None = Field(None, description="one of the request's tags, which are its key's")
    route: Names | None = Field(None, description="the request's `model`")
    input_tokens: TokenSpan | None = Field(None, description="estimated, by the bytes of the prompt")
    has: Annotated[tuple[Medium, ...], BeforeValidator(_listed), Field(min_length=1)] | None = Field(
        None, description="image, audio or document"
    )
    tools: bool | None = Field(None, description="whether tools are offered to the model")
    form: bool | None = Field(None, description="whether the answer is to have a form, such as a JSON schema")
    budget_left: BudgetSpan | None = Field(None, description="of the budgets that the request falls under")
    headers: dict[str, Names] = Field({}, description="headers of the request that gateway.rule_headers names")


class CanarySettings(Settings):
    """A part of the requests goes to another route; the others go on to the next rule."""

    percent: float = Field(gt=0, le=100, description="how many of a hundred")
    to: str = Field(description="a route")
    by: Literal["session", "tenant", "key", "random"] = Field(
        "session",
        description="what stays on one side, for good; without a session, tenant or key the conversation's beginning "
        "does. random: each request for itself",
    )


class ThenSettings(Settings):
    """What becomes of the request. Nothing at all: it goes its way, and no later rule is asked."""

    route: str | None = Field(None, description="the route that answers instead")
    canary: CanarySettings | None = Field(None, description="a part of the requests to another route")
    only: Patterns = Field((), max_length=256, description="targets that may answer: PROVIDER/MODEL or PROVIDER/*")
    exclude: Patterns = Field((), max_length=256, description="targets that may not, written likewise")
    prefer_own: bool = Field(False, description="own pools of a route first, whatever the strategy; others behind them")
    strategy: StrategyName | None = Field(None, description="instead of the route's")
    refuse: str | None = Field(None, min_length=1, max_length=1000, description="403 with these words")

    @field_validator("only", "exclude")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not _PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is no target: write PROVIDER/MODEL, or PROVIDER/* for all of a provider")
        return patterns

    @model_validator(mode="after")
    def _says_one_thing(self) -> ThenSettings:
        others = sorted(self.model_fields_set - {"refuse"})
        if self.refuse is not None and others:
            raise ValueError(f"a request that is refused goes nowhere: take {' and '.join(others)} out, or refuse")
        if self.canary is not None and self.route is not None:
            raise ValueError("give a route or a canary, not both; a canary's other requests go on to the next rule")
        return self

    @property
    def leads_to(self) -> str | None:
        """The other route."""
        return self.route if self.canary is None else self.canary.to


class RuleSettings(Settings):
    """One rule. The first that a request meets decides, and it alone."""

    name: str = Field(description="for headers, logs and explanations")
    when: WhenSettings = Field(WhenSettings(), description="which requests")
    then: ThenSettings = Field(description="what becomes of them")

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not _RULE.fullmatch(name):
            raise ValueError(f"{name!r} is no name: use small letters, digits, '_', '.' and '-'")
        return name


def admits(pattern: str, target: str) -> bool:
    """Whether PROVIDER/MODEL or PROVIDER/* means `target`."""
    return target.startswith(pattern[:-1]) if pattern.endswith("/*") else target == pattern


def check_header_names(names: Sequence[str]) -> None:
    """Raises ValueError for one that rules must not go by."""
    for i, name in enumerate(names):
        if not HEADER.fullmatch(name):
            raise ValueError(f"{i}: {name!r} is no name of a header: use small letters, digits and '-'")
        if name in AUTHENTICATION or name.startswith("x-diptych-"):
            raise ValueError(
                f"{i}: {name} says who asks or how he is answered, and that is not for a rule to read: use the "
                "conditions tenant, key and tag, which are the key's"
            )


def check_rules(
    rules: Sequence[RuleSettings],
    *,
    reach: Mapping[str, Sequence[str]],
    direct: bool,
    budgets: Iterable[str],
    headers: Iterable[str],
) -> None:
    """Raises ValueError that begins with the place in the list. `reach`: the targets of each route and of all that
    stand behind it; `direct`: clients may name others.
    """
    names = [rule.name for rule in rules]
    for i, rule in enumerate(rules):
        if names.index(rule.name) != i:
            raise ValueError(f"{i}.name: there is a rule {rule.name} before; each needs a name of its own")
        _check_when(f"{i}.when", rule.when, reach, direct, (tuple(budgets), frozenset(headers)))
        _check_then(f"{i}.then", rule, reach, direct)
        for earlier in rules[:i]:
            if earlier.then.canary is not None and earlier.then.canary.percent < 100:
                continue
            if covers(earlier.when, rule.when):
                raise ValueError(
                    f"{i}: {rule.name} is never reached, for {earlier.name} before it takes all that it would; put "
                    "the narrower one first"
                )


def _check_when(
    path: str,
    when: WhenSettings,
    reach: Mapping[str, Sequence[str]],
    direct: bool,
    known: tuple[Sequence[str], frozenset[str]],
) -> None:
    budgets, headers = known
    for name in when.route or ():
        if name not in reach and not (direct and _PATTERN.fullmatch(name)):
            raise ValueError(f"{path}.route: {_no_route(name, reach)}, so that no request asks for it")
    if (left := when.budget_left) is not None:
        if not budgets:
            raise ValueError(f"{path}.budget_left: there are no budgets, so that it never holds; see gateway.budgets")
        if left.budget is not None and left.budget not in budgets:
            raise ValueError(
                f"{path}.budget_left.budget: there is no budget {left.budget!r}; there are {_and(budgets)}"
            )
    for name in when.headers:
        if name not in headers:
            raise ValueError(
                f"{path}.headers.{name}: rules may not read this header; write it into gateway.rule_headers, in small "
                "letters, where clients may choose what it says"
            )


def _check_then(path: str, rule: RuleSettings, reach: Mapping[str, Sequence[str]], direct: bool) -> None:
    then = rule.then
    key = "route" if then.canary is None else "canary.to"
    to = then.leads_to
    if to is not None:
        if to not in reach:
            raise ValueError(f"{path}.{key}: {_no_route(to, reach)}")
        if to in (rule.when.route or ()):
            raise ValueError(f"{path}.{key}: {to} -> {to} is a circle; the request asks for that route already")
    every = {target for targets in reach.values() for target in targets}
    for word, patterns in (("only", then.only), ("exclude", then.exclude)):
        for k, pattern in enumerate(patterns):
            if not direct and not any(admits(pattern, target) for target in every):
                raise ValueError(f"{path}.{word}.{k}: {pattern} is no target of any route; see gateway.routes")
    if then.only or then.exclude:
        names = (to,) if to is not None else tuple(name for name in rule.when.route or () if name in reach)
        left = [target for name in names for target in reach[name] if may_answer(target, then.only, then.exclude)]
        if names and not left:
            raise ValueError(f"{path}: only and exclude leave no target of {_and(names)}; refuse such requests instead")


def may_answer(target: str, only: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether two lists of patterns let a target answer."""
    if only and not any(admits(pattern, target) for pattern in only):
        return False
    return not any(admits(pattern, target) for pattern in exclude)


def covers(wide: WhenSettings, narrow: WhenSettings) -> bool:
    """Whether `wide` holds wherever `narrow` does, as far as can be told without a request."""
    for name in ("tenant", "key", "tag", "route", "has"):
        if not _within(getattr(narrow, name), getattr(wide, name)):
            return False
    for name in ("tools", "form"):
        if getattr(wide, name) not in (None, getattr(narrow, name)):
            return False
    for header, values in wide.headers.items():
        if not _within(narrow.headers.get(header), values):
            return False
    if wide.budget_left is not None and (
        narrow.budget_left is None or narrow.budget_left.budget != wide.budget_left.budget
    ):
        return False
    return _span_within(narrow.input_tokens, wide.input_tokens) and _span_within(narrow.budget_left, wide.budget_left)


def _within(narrow: Sequence[str] | None, wide: Sequence[str] | None) -> bool:
    return wide is None or (narrow is not None and set(narrow) <= set(wide))


def _span_within(narrow: TokenSpan | BudgetSpan | None, wide: TokenSpan | BudgetSpan | None) -> bool:
    if wide is None:
        return True
    if narrow is None:
        return False
    is_lower = wide.above is None or (narrow.above is not None and narrow.above >= wide.above)
    return is_lower and (wide.below is None or (narrow.below is not None and narrow.below <= wide.below))


def _no_route(name: str, reach: Mapping[str, Sequence[str]]) -> str:
    return f"there is no route {name!r} (there are {_and(reach) or 'none'})"


def _and(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
