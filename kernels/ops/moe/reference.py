"""Definition of the sparse layer. Letters as in experts.py.

weights of a token: softmax over its E logits x @ router.T, in float32; the K largest count, of equal ones the lowest id
first, divided by their sum where the model renormalises. Part k of the result: weight * down(silu(gate(x)) * up(x)) of
the k-th chosen expert, rounded to the model's dtype; the next kernel adds the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..parts import Parts
from .experts import Experts, MoeWorkspace


def route(x_TH: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """The experts of each token, int64 [T, K], in falling order of their weights, float32 [T, K]."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    probabilities = torch.softmax(linear(x_TH.to(wide), experts.router_EH.to(wide)), dim=-1)
    sorted_TE, ids_TE = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, ids = sorted_TE[:, : experts.top_k], ids_TE[:, : experts.top_k]
    return ids, weights / weights.sum(dim=-1, keepdim=True) if experts.renormalise else weights


def moe(x_TH: Tensor, experts: Experts, workspace: MoeWorkspace) -> Parts:
    """See launch.py. The workspace is not used."""
    ids, weights = route(x_TH, experts)
    out_KTH = torch.empty(experts.top_k, *x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    for expert in sorted(set(ids.flatten().tolist())):
        tokens, ranks = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = linear(x_TH[tokens], experts.gate_up_EIH[expert]).chunk(2, dim=-1)
        out = linear(silu(gate) * up, experts.down_EHI[expert])
        out_KTH[ranks, tokens] = (out * weights[tokens, ranks, None]).to(x_TH.dtype)
    return Parts(out_KTH, experts.top_k)
