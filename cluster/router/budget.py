"""How much further work failures may cause: a bucket per tenant, filled by the requests it sends. Pure.

Without it a cluster at its limit that loses one engine would answer every request twice, and lose the next one.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_TENANTS = 4096  # whose buckets are remembered; one that is forgotten is full again


class RetryBudget:
    """Each admitted request brings `fraction` of a retry, up to `burst` of them; every tenant begins with these."""

    def __init__(self, *, fraction: float, burst: int) -> None:
        assert fraction >= 0
        assert burst >= 1
        self._fraction = fraction
        self._burst = float(burst)
        self._left: OrderedDict[str, float] = OrderedDict()  # who was heard of last, last

    def admitted(self, tenant: str) -> None:
        """A request of `tenant` was taken in."""
        self._put(tenant, min(self.left(tenant) + self._fraction, self._burst))

    def try_take(self, tenant: str) -> bool:
        """One retry or move; False: it would be one too many, and the failure is the answer."""
        left = self.left(tenant)
        if left < 1:
            return False
        self._put(tenant, left - 1)
        return True

    def left(self, tenant: str) -> float:
        """Retries that `tenant` has now."""
        return self._left.get(tenant, self._burst)

    def _put(self, tenant: str, left: float) -> None:
        self._left[tenant] = left
        self._left.move_to_end(tenant)
        if len(self._left) > MAX_TENANTS:
            self._left.popitem(last=False)
