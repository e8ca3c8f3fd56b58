"""Sums that are not made yet: a linear or the experts leave several addends, the next elementwise kernel adds them.

That saves the launch that would do nothing but add. S: addends, T: tokens, N: numbers of a token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Parts(NamedTuple):
    """`data` is [S, T, N], float32 or the model's dtype, each row of N contiguous; its sum over S, in order, is meant.

    `count` is S: how many addends a kernel reads.
    """

    data: Tensor
    count: int  # type: ignore[assignment]  # hides tuple's own, which nobody wants of it

    def total(self) -> Tensor:
        """The sum in float32, [T, N], added in the order of S as every kernel does."""
        found = self.data[0].float()
        for part in self.data[1 : self.count]:
            found = found + part.float()
        return found
