"""Entry of the sparse layer: checks shapes, chooses by device type. Letters as in experts.py."""

from __future__ import annotations

from torch import Tensor

from ..parts import Parts
from ..table import implementation
from .experts import Experts, MoeWorkspace


def moe(x_TH: Tensor, experts: Experts, workspace: MoeWorkspace) -> Parts:
    """What the experts of each token add to it: K parts [K, T, H] in the workspace, good until its next call.

    Nothing waits for the device, and memory and launches depend on T alone: a graph can hold the call.
    """
    num_tokens, hidden = x_TH.shape
    if hidden != experts.hidden or not x_TH.is_contiguous() or x_TH.dtype is not experts.router_EH.dtype:
        raise ValueError(
            f"moe: tokens {tuple(x_TH.shape)} {x_TH.dtype}, experts of {experts.hidden} {experts.router_EH.dtype}"
        )
    if num_tokens == 0 or not workspace.fits(experts, num_tokens):
        raise ValueError(
            f"moe: {num_tokens} tokens, the workspace is for 1 to {workspace.max_tokens} and another shape"
        )
    return implementation("moe", x_TH.device.type).moe(x_TH, experts, workspace)  # type: ignore[no-any-return]
