"""Definition of logprobs. V tokens of the vocabulary, N rows of logits, R rows asked for, K alternatives.

A row's logprobs are log_softmax of its logits in float32. The rank of a token is 1 plus the number of tokens with a
larger logprob; alternatives are ordered by logprob, equal ones by id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import Logprobs


def logprobs(logits_NV: Tensor, rows_R: Tensor, tokens_R: Tensor, most: int) -> Logprobs:
    """See launch.py."""
    all_RV = torch.log_softmax(logits_NV[rows_R].float(), dim=-1)
    own_R = all_RV.gather(1, tokens_R[:, None])[:, 0]
    ranks_R = (all_RV > own_R[:, None]).sum(dim=-1) + 1
    values_RV, ids_RV = torch.sort(all_RV, dim=-1, descending=True, stable=True)
    return Logprobs(own_R, ranks_R, ids_RV[:, :most], values_RV[:, :most])
