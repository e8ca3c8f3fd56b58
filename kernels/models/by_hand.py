"""A model loaded for the hand-written decoder: shape, weights on the device, rotary table. Called by model.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..ops.moe.launch import refusal as experts_refusal
from ..ops.paged_attention.launch import refusal as attention_refusal
from ..ops.qk_write.rope import RopeTable
from ..weights import weights_digest
from .decoder import Decoder
from .rope import frequencies
from .shape import DecoderShape
from .tensors import DecoderTensors, allocate, fill_randomly, load, random_digest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HandWritten:
    """Ready to compute once it gets buffers for a largest step."""

    shape: DecoderShape
    tensors: DecoderTensors
    rope: RopeTable
    digest: bytes  # of the weights
    slow: tuple[str, ...]  # what is computed by its definition, which asks the device, for want of a kernel

    def decoder(self, *, max_tokens: int, deterministic: bool = False) -> Decoder:
        """With buffers for steps of up to `max_tokens` tokens. `deterministic`: for steps whose work list is invariant
        (split.allocate); nothing may be slow then.
        """
        assert not (deterministic and self.slow)
        return Decoder(
            self.shape,
            self.tensors,
            self.rope,
            max_tokens=max_tokens,
            capturable=not self.slow,
            deterministic=deterministic,
        )


def load_by_hand(
    folder: Path, shape: DecoderShape, *, dtype: torch.dtype, device: torch.device, random_seed: int | None
) -> HandWritten:
    """Fill the model's weights, from the folder's files or with random numbers. GenericOnly: its rotary frequencies
    are of a kind that is not known. StartupError: the files do not fit.
    """
    angles_P, scale = frequencies(shape.rope, shape.head_dim)
    tensors = allocate(shape, dtype, device)
    if random_seed is None:
        load(tensors, shape, folder)
        digest = weights_digest(folder)
    else:
        fill_randomly(tensors, shape, random_seed)
        digest = random_digest(shape, dtype, random_seed)
    reasons = [attention_refusal(shape.head_dim, dtype)]
    if shape.experts is not None:
        reasons.append(experts_refusal(shape.experts.num, shape.hidden, shape.experts.intermediate))
    return HandWritten(
        shape=shape,
        tensors=tensors,
        rope=_table(angles_P.to(device), scale, shape.max_context_tokens),
        digest=digest,
        slow=tuple(reason for reason in reasons if reason is not None and device.type == "cuda"),
    )


def _table(angles_P: torch.Tensor, scale: float, positions: int) -> RopeTable:
    angles_CP = torch.arange(positions, dtype=torch.float32, device=angles_P.device)[:, None] * angles_P
    return RopeTable(angles_CP.cos() * scale, angles_CP.sin() * scale)
