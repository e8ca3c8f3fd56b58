"""Linears that read the same input, computed as one: q/k/v and gate/up.

The model's code keeps calling q_proj(x), k_proj(x), v_proj(x). The first of them computes all, the others hand out
their share when they are given the very same tensor, else all is computed anew: order and number of calls are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Attribute names whose linears may be merged, where one module has them all.
MERGED_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class MergedLinear(nn.Module):
    """Several linears over one input, as one weight. Not for two threads at once."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        biases = [part.bias.data for part in parts if part.bias is not None]
        self.in_features = parts[0].in_features
        with torch.device("meta"):
            self.linear = nn.Linear(self.in_features, sum(self.sizes), bias=bool(biases))
        self.linear.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
        if biases:
            self.linear.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self._input: Tensor | None = None
        self._shares: list[Tensor | None] = []

    def share(self, index: int, x: Tensor) -> Tensor:
        """The output of part `index` for `x`."""
        if self._input is x:
            held = self._shares[index]
            if held is not None:
                self._shares[index] = None
                if not any(share is not None for share in self._shares):
                    self._input = None
                return held
        self._shares = list(torch.split(self.linear(x), self.sizes, dim=-1))
        self._input = x
        held, self._shares[index] = self._shares[index], None
        assert held is not None
        return held


class Share(nn.Module):
    """Stands where a merged linear stood."""

    def __init__(self, merged: MergedLinear, index: int) -> None:
        super().__init__()
        # A list hides it from the module tree, where it appears once, as `merged_...` of the parent.
        self._merged = [merged]
        self.index = index
        self.out_features = merged.sizes[index]
        self.in_features = merged.in_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; a view into the merged output."""
        return self._merged[0].share(self.index, x)


def merge_linears(model: nn.Module, groups: Sequence[tuple[str, ...]] = MERGED_NAMES) -> list[str]:
    """Merge in place wherever the structure allows it; gives the names of the groups that had to stay as they are."""
    unmerged = []
    for name, module in list(model.named_modules()):
        for names in groups:
            parts = [getattr(module, part, None) for part in names]
            if any(part is None for part in parts):
                continue
            linears = [part for part in parts if type(part) is nn.Linear]
            if len(linears) != len(names) or not _alike(linears):
                unmerged.append(f"{name}.{{{','.join(names)}}}")
                continue
            merged = MergedLinear(linears)
            setattr(module, "merged_" + "_".join(part.removesuffix("_proj") for part in names), merged)
            for index, part_name in enumerate(names):
                setattr(module, part_name, Share(merged, index))
    return unmerged


def _alike(linears: Sequence[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        part.in_features == first.in_features
        and (part.bias is None) == (first.bias is None)
        and part.weight.dtype == first.weight.dtype
        for part in linears
    )
