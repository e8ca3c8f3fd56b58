"""GET /openapi.json: the description of the API, as description/ declares it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from diptych.cluster.keys import ApiKeys

from .description import document


class DescriptionPage:
    """The route. The two documents, with keys and without, are made when they are first asked for."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys
        self._encoded: dict[bool, bytes] = {}

    async def page(self, request: Request) -> Response:
        """OpenAPI 3.1 as JSON."""
        has_keys = self._keys is not None and self._keys.is_asked
        if has_keys not in self._encoded:
            self._encoded[has_keys] = document.encoded(has_keys=has_keys)
        return Response(self._encoded[has_keys], media_type="application/json")
