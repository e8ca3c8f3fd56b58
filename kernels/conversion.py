"""Checkpoints in another layout than the model's: transformers knows how to rename, merge and split their tensors.

Example: Mixtral's files hold each expert's matrices, the model one tensor for all experts. Called by weights.py when
the names in the files are not the model's own.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from diptych.protos.errors import StartupError


def has_conversion(model: nn.Module) -> bool:
    """Does transformers list a change of layout for this class of models?"""
    return bool(_conversion(model))


def load_converted(
    model: nn.Module, files: list[Path], *, dtype: torch.dtype, device: torch.device
) -> tuple[set[str], list[str], list[str]]:
    """Fill `model` from `files`; gives the names that stay without a tensor, those left over, and what went wrong."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    load: Any = convert_and_load_state_dict_in_model
    config: Any = LoadStateDictConfig
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        settings = config(dtype=dtype, device_map={"": device}, weight_mapping=_conversion(model))
        report = load(model, slices, settings, None)[0]
    wrong = [f"{name}: {error}" for name, error in report.conversion_errors.items()] + list(report.error_msgs)
    wrong += [f"{name} {list(theirs)} instead of {list(mine)}" for name, theirs, mine in report.mismatched_keys]
    return set(report.missing_keys), sorted(report.unexpected_keys), wrong


def _conversion(model: nn.Module) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError as exc:
        raise StartupError("This version of transformers cannot convert the weights; 5.17 and newer can.") from exc
    find: Any = get_model_conversion_mapping
    return list(find(model))
