"""Entry of the sparse layer: checks shapes, chooses by device type. Letters as in experts.py."""

from __future__ import annotations

from torch import Tensor

from ..parts import Parts
from ..table import implementation
from .experts import Experts, MoeWorkspace

_MOST_EXPERTS = 512  # a program of the router holds the logits of all
_UNIT = 16  # numbers of a row, so that rows begin where the device reads 16 bytes at once


def refusal(num_experts: int, hidden: int, intermediate: int) -> str | None:
    """Why such layers are computed by their slow definition on a card, or None: for the list of what is degraded."""
    if num_experts > _MOST_EXPERTS or hidden % _UNIT or intermediate % _UNIT:
        return (
            f"experts have kernels for up to {_MOST_EXPERTS} of them and sizes in steps of {_UNIT}, not for "
            f"{num_experts} of {hidden} x {intermediate}"
        )
    return None


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
    kind = x_TH.device.type
    if kind != "cpu" and refusal(experts.num_experts, hidden, experts.intermediate) is not None:
        kind = "cpu"  # the row of the definition
    return implementation("moe", kind).moe(x_TH, experts, workspace)  # type: ignore[no-any-return]
