"""GET /v1/usage: what a tenant's requests used and cost, and for an admin's key those of all tenants."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diptych.cluster.gateway.money_settings import BudgetSettings
from diptych.cluster.store.database import Store
from diptych.cluster.usage import read_query, usage_of
from diptych.protos.errors import Forbidden, InvalidRequest
from diptych.protos.strict_json import printable

from .access import may_administer, tenant_of


class UsagePage:
    """`budgets`: those of the configuration. `clock`: seconds since 1970."""

    def __init__(
        self, store: Store, budgets: Mapping[str, BudgetSettings], clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._budgets = budgets
        self._clock = clock

    async def page(self, request: Request) -> Response:
        """The answer. Raises InvalidRequest, and Forbidden where another tenant is asked for without an admin's key."""
        fields = request.query_params
        if twice := [name for name in fields if len(fields.getlist(name)) > 1]:
            raise InvalidRequest(f"{printable(twice[0])} is given twice", printable(twice[0]))
        now, own = self._clock(), tenant_of(request.scope)
        query = read_query(fields, own, now)
        if query.tenant != own and not may_administer(request.scope):
            raise Forbidden("tenant: this key is for its own tenant's usage; others', or all with `*`, need an admin's")
        told = await self._store.read(usage_of(query, self._budgets, now))
        return JSONResponse(told)
