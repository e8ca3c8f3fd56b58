"""Tensors from a model folder's safetensors files into a module built on the meta device. Never unpickles.

Knows nothing of architectures: names in the files are the model's own, with or without the base model's prefix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diptych.protos.errors import StartupError

from .conversion import has_conversion, load_converted

_SAMPLE_BYTES = 4096
_SAMPLES_PER_FILE = 256
_NOT_CONTENT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, from its index or all there are; StartupError when there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise StartupError(f"{index} names files outside of its folder.")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise StartupError(f"{folder} has no weights in safetensors format: {', '.join(missing) or '*.safetensors'}.")
    return [folder / name for name in names]


def weights_digest(folder: Path) -> bytes:
    """sha256 over the configuration and each file's size, header (names, types, offsets) and 256 samples of 4 KiB.

    Sampling keeps it at milliseconds for any size. Two fine-tunings of one model differ in every sample; a single
    flipped byte may go unseen.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = {name: value for name, value in config.items() if name not in _NOT_CONTENT}
    digest.update(json.dumps(content, sort_keys=True).encode())
    for path in weight_files(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            digest.update(length + header + size.to_bytes(8, "little"))
            begin = 8 + len(header)
            span = max(size - begin - _SAMPLE_BYTES, 0)
            for sample in range(_SAMPLES_PER_FILE):
                file.seek(begin + span * sample // (_SAMPLES_PER_FILE - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def load_weights(
    model: nn.Module, folder: Path, *, device: torch.device, prefix: str, ignorable: Iterable[str]
) -> None:
    """Give every parameter and persistent buffer of `model` its tensor, cast to the parameter's dtype.

    `prefix` is the attribute of the base model in the full one: checkpoints of the base model leave it out. Tied
    parameters may be missing. Missing, unexpected and misshapen tensors are a StartupError that names them.
    """
    files = weight_files(folder)
    expected = dict(model.state_dict(keep_vars=True))
    optional = set(getattr(model, "all_tied_weights_keys", {}) or {})
    ignored = [re.compile(pattern) for pattern in ignorable]
    targets, unexpected = _match_names(files, expected, prefix)
    wrong: list[str] = []
    own_names = set(targets.values()) >= set(expected) - optional
    if not own_names and has_conversion(model):
        dtype = next(model.parameters()).dtype
        missing, unexpected, wrong = load_converted(model, files, dtype=dtype, device=device)
        loaded = set(expected) - missing
    else:
        wrong = _load_named(model, files, targets, expected, device)
        loaded = set(targets.values())
    problems = [
        f"{kind}: {_some(names)}"
        for kind, names in (
            ("missing", sorted(set(expected) - loaded - optional)),
            ("unexpected", [name for name in unexpected if not any(pattern.search(name) for pattern in ignored)]),
            ("not fitting", wrong),
        )
        if names
    ]
    if problems:
        raise StartupError(f"The weights in {folder} do not fit {type(model).__name__}; tensors {'; '.join(problems)}.")
    _retie(model, loaded)


def _match_names(files: list[Path], expected: Mapping[str, Any], prefix: str) -> tuple[dict[str, str], list[str]]:
    """The parameter of each tensor in the files, and the tensors that have none."""
    targets: dict[str, str] = {}
    unexpected: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except SafetensorError as exc:
            raise StartupError(f"{path} is not a readable safetensors file: {exc}") from exc
        for name in names:
            target = _target(name, expected, prefix)
            if target is None:
                unexpected.append(name)
            else:
                targets[name] = target
    return targets, unexpected


def _load_named(
    model: nn.Module,
    files: list[Path],
    targets: Mapping[str, str],
    expected: Mapping[str, Tensor],
    device: torch.device,
) -> list[str]:
    """Load the tensors that have a target; gives those of another shape."""
    wrong = []
    for path in files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in targets:
                    continue
                tensor, goal = file.get_tensor(name), expected[targets[name]]
                if tensor.shape != goal.shape:
                    wrong.append(f"{name} {list(tensor.shape)} instead of {list(goal.shape)}")
                    continue
                _assign(model, targets[name], tensor.to(goal.dtype))
    return wrong


def _target(name: str, expected: Mapping[str, Any], prefix: str) -> str | None:
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in expected), None)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
        # transformers' own initialisation, which fills the computed buffers, leaves flagged tensors alone.
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        owner._parameters[leaf] = tensor
    else:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        owner._buffers[leaf] = tensor


def _retie(model: nn.Module, loaded: set[str]) -> None:
    """Tied parameters share their source's tensor; one that the files hold too must be its equal."""
    for name, source in (getattr(model, "all_tied_weights_keys", {}) or {}).items():
        tensor = model.get_parameter(source)
        if name in loaded and not torch.equal(model.get_parameter(name), tensor):
            continue  # The checkpoint has both and they differ: the model was not tied when it was saved.
        owner_name, _, leaf = name.rpartition(".")
        model.get_submodule(owner_name)._parameters[leaf] = tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
