"""Public prices of providers, from the snapshot inside the package genai-prices; no network, whatever that package can.

Imported and loaded when the first price is asked for: 0.08 s of CPU on top of httpx2 and pydantic, 10 MiB. Of the
prices of tools only web searches are read: no usage that we read tells of others.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from .rates import Rate, Rates, nanos_of

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot

# Our names of providers to the table's. Others are looked for under their own name, exactly; resellers that the table
# has no line for are unknown, as one's own servers are.
_NAMES = {
    "azure_responses": "azure",
    "bedrock": "aws",
    "bedrock_anthropic": "aws",
    "moonshot": "moonshotai",
    "openai_responses": "openai",
    "vertex": "google",
    "vertex_anthropic": "google",
    "xai": "x-ai",
}


class PriceTable:
    """The snapshot. `load` may be called in a thread beforehand."""

    def __init__(self) -> None:
        self._snapshot: DataSnapshot | None = None
        self._ids: frozenset[str] = frozenset()

    def load(self) -> None:
        """Import it. Idempotent."""
        if self._snapshot is None:
            from genai_prices.data import providers
            from genai_prices.data_snapshot import DataSnapshot

            self._ids = frozenset(provider.id for provider in providers)
            self._snapshot = DataSnapshot(providers=providers, from_auto_update=False)

    def rates(self, provider: str, model: str, at: float) -> Rates | None:
        """Of PROVIDER/MODEL at a time in seconds since 1970; None where the table does not know."""
        self.load()
        assert self._snapshot is not None
        name = _NAMES.get(provider, provider)
        if name not in self._ids:
            return None
        try:
            _, found = self._snapshot.find_provider_model(model, None, name, None)
            prices = found.get_prices(datetime.fromtimestamp(at, UTC))
        except (LookupError, ValueError):
            return None
        return _read(vars(prices))


def _read(prices: dict[str, Any]) -> Rates | None:
    rates = {
        ours: _rate(prices.get(theirs))
        for ours, theirs in (
            ("cache_read", "cache_read_mtok"),
            ("cache_write", "cache_write_mtok"),
            ("cache_write_1h", "cache_write_1h_mtok"),
            ("input_audio", "input_audio_mtok"),
            ("output_audio", "output_audio_mtok"),
            ("reasoning", "output_reasoning_mtok"),
        )
    }
    paid, made = _rate(prices.get("input_mtok")), _rate(prices.get("output_mtok"))
    if paid is None or made is None:
        return None
    requests = prices.get("requests_kcount")
    per_request = nanos_of(requests / 1000) if isinstance(requests, Decimal) else 0
    searches = prices.get("web_searches_kcount")
    web_search = nanos_of(searches / 1000) if isinstance(searches, Decimal) else None
    return Rates(input=paid, output=made, source="table", per_request=per_request, web_search=web_search, **rates)


def _rate(price: Any) -> Rate | None:
    if price is None:
        return None
    if isinstance(price, Decimal):
        return Rate(nanos_of(price))
    return Rate(nanos_of(price.base), tuple((tier.start, nanos_of(tier.price)) for tier in price.tiers))
