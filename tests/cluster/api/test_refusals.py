"""What the headers of a refusal tell a client's library to do: the official ones ask again by themselves."""

from __future__ import annotations

import pytest

from diptych.cluster.api.errors import headers_of
from diptych.cluster.gateway.accounts import IN_WORK_RETRY_S, BudgetExceeded
from diptych.cluster.gateway.ledger import Unpriced
from diptych.cluster.gateway.limits import LimitReached
from diptych.cluster.gateway.public import UpstreamFailed, UpstreamRefused
from diptych.protos.errors import DiptychError, EngineLost, Overloaded, OverShare


@pytest.mark.parametrize(
    ("error", "may_help"),
    [
        (BudgetExceeded("spent", 86_400.0), False),
        (BudgetExceeded("spent until midnight", 7_200.0), False),
        (BudgetExceeded("spent until midnight", 90.0), True),
        (BudgetExceeded("set aside", IN_WORK_RETRY_S), True),
        (LimitReached("requests", 60.0), True),
        (LimitReached("tokens", 0.2), True),
        (OverShare("full", 3.0), True),
        (Overloaded("a provider's quota", 600.0), False),
        (Overloaded("full", 1.0), True),
        (Unpriced("no price"), False),
        (UpstreamRefused("a key"), False),
        (UpstreamFailed("bad luck"), True),
        (EngineLost("gone"), True),
    ],
)
def test_a_client_asks_again_where_that_can_help(error: DiptychError, may_help: bool) -> None:
    """A spent budget was asked again after half a second, twice, or the program slept for the rest of the day."""
    headers = headers_of(error)
    assert headers.get("x-should-retry") == (None if may_help else "false")
    if isinstance(error, BudgetExceeded | LimitReached):
        assert int(headers["retry-after"]) >= error.retry_after_s
