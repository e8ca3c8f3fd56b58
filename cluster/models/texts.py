"""What a model folder says about embedding or ranking texts: config.json and the files of sentence-transformers.

Called by plan.py and entry.py for models whose task is not to generate, by facts.py for the task itself. Reads JSON
only; imports no model code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.protos.errors import StartupError

Task = Literal["generate", "embed", "rerank"]
Pooling = Literal["mean", "cls", "last"]
Activation = Literal["sigmoid", "identity"]

_MODULES = "modules.json"
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_RANKER = "ForSequenceClassification"
_MAX_JSON_BYTES = 4 << 20
_MAX_PROMPT_CHARS = 4096
# sentence-transformers' names of what we compute; its older files have a flag for each of its ways.
_POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Identity": "identity",
    "torch.nn.Sigmoid": "sigmoid",
}
# Position tables whose first rows, up to the padding token's number, belong to no position.
_SHIFTED = ("roberta", "camembert", "mpnet", "longformer", "data2vec-text", "ibert", "esm")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """What is made of a text. Of a ranker that scores pairs itself, `dimensions` is 1 and pooling its own business."""

    task: Literal["embed", "rerank"]
    dimensions: int
    max_tokens: int  # longest text, special tokens included; of a ranker the longest pair
    pooling: Pooling = "mean"
    normalize: bool = True
    activation: Activation = "sigmoid"  # of a ranker's numbers
    lower_case: bool = False  # texts are, before they are tokens
    prompts: tuple[tuple[str, str], ...] = ()  # (name, what goes before a text)
    default_prompt: str = ""  # its name; empty: none
    pools_prompt: bool = True  # a prompt's tokens take part in a mean
    tells_pairs: bool = True  # the model is told which tokens of a pair are the second text's


def detect_task(folder: Path, architecture: str) -> Task:
    """By the class in config.json, and whether the folder was made for sentence-transformers."""
    if architecture.endswith(_RANKER):
        return "rerank"
    if (folder / _MODULES).is_file() or not architecture.endswith(_GENERATORS):
        return "embed"
    return "generate"


def read_text_facts(folder: Path, task: Literal["embed", "rerank"]) -> TextFacts:
    """Of the model in `folder`, whose config.json was checked before. Raises StartupError with the file and why."""
    config = _object(folder / "config.json")
    text = config.get("text_config")
    merged: Mapping[str, object] = {**config, **text} if isinstance(text, dict) else config
    room = _room(folder, merged)
    if task == "rerank":
        return _ranker(folder, config, room)
    modules = _modules(folder)
    if modules is None:
        pooling: Pooling = "last" if _is_decoder(merged) else "mean"
        return TextFacts(task="embed", dimensions=_hidden_size(folder, merged), max_tokens=room, pooling=pooling)
    pooling_file = folder / modules["Pooling"] / "config.json" if "Pooling" in modules else None
    own = _object(pooling_file) if pooling_file is not None else {}
    sizes = _optional(folder / "sentence_bert_config.json")
    longest = sizes.get("max_seq_length")
    prompts = _prompts(folder)
    default = _optional(folder / "config_sentence_transformers.json").get("default_prompt_name") or ""
    if default and default not in dict(prompts):
        raise StartupError(f"{folder}: its default prompt {default!r} is not among its prompts. Get its files again.")
    return TextFacts(
        task="embed",
        dimensions=_hidden_size(folder, merged),
        max_tokens=min(longest, room) if type(longest) is int and longest > 1 else room,
        pooling=_pooling(pooling_file, own),
        normalize="Normalize" in modules,
        lower_case=sizes.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=str(default),
        pools_prompt=own.get("include_prompt") is not False,
    )


def _ranker(folder: Path, config: Mapping[str, object], room: int) -> TextFacts:
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise StartupError(
            f"{folder / 'config.json'}: its head tells {count} classes apart. Pairs are ranked by a head with one "
            "number, as cross-encoders have it (num_labels 1)."
        )
    own = config.get("sentence_transformers")
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = name or config.get("sbert_ce_default_activation_function") or "torch.nn.Sigmoid"
    if name not in _ACTIVATIONS:
        raise StartupError(f"{folder / 'config.json'}: the activation {name!r} is not one of Sigmoid and Identity.")
    inputs = _optional(folder / "tokenizer_config.json").get("model_input_names")
    tells = "token_type_ids" in inputs if isinstance(inputs, list) else True
    activation = _ACTIVATIONS[str(name)]
    return TextFacts(task="rerank", dimensions=1, max_tokens=room, activation=activation, tells_pairs=tells)


def _modules(folder: Path) -> dict[str, str] | None:
    """The folders of the steps in modules.json by their kind; None without such a file. Raises StartupError for steps
    that are not computed here.
    """
    path = folder / _MODULES
    if not path.is_file():
        return None
    listed = _json(path)
    found: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else ():
        kind = str(entry.get("type", "")).rpartition(".")[2] if isinstance(entry, dict) else ""
        place = entry.get("path", "") if isinstance(entry, dict) else None
        is_known = kind in ("Transformer", "Pooling", "Normalize") and kind not in found
        if not is_known or not isinstance(place, str) or "/" in place or place.startswith("."):
            raise StartupError(
                f"{path}: the step {kind or entry!r} is not computed here; known are Transformer, Pooling and "
                "Normalize, once each."
            )
        found[kind] = place
    if "Transformer" not in found or found["Transformer"]:
        raise StartupError(f"{path}: the model itself, the step Transformer, must lie in the folder itself.")
    return found


def _pooling(path: Path | None, own: Mapping[str, object]) -> Pooling:
    if path is None:
        return "mean"
    mode = own.get("pooling_mode")
    modes = mode if isinstance(mode, list) else [mode]
    if mode is None:
        modes = [name for flag, name in _FLAGS.items() if own.get(flag) is True] or ["mean"]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        told = " and ".join(map(str, modes))
        raise StartupError(f"{path}: pooling by {told} is not computed here; known are {', '.join(_POOLINGS)}.")
    return _POOLINGS[modes[0]]


def _prompts(folder: Path) -> tuple[tuple[str, str], ...]:
    path = folder / "config_sentence_transformers.json"
    given = _optional(path).get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(prompt, str | None) for prompt in given.values()):
        raise StartupError(f"{path}: prompts must be an object of texts. Get the file again.")
    if any(len(prompt or "") > _MAX_PROMPT_CHARS for prompt in given.values()):
        raise StartupError(f"{path} has a prompt of more than {_MAX_PROMPT_CHARS} characters.")
    return tuple((name, prompt or "") for name, prompt in given.items())


def _room(folder: Path, config: Mapping[str, object]) -> int:
    """Positions that the model has, or fewer where its tokenizer says so."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int or value < 3:
        raise StartupError(f"{folder / 'config.json'} does not say how many positions the model has ({names[0]}).")
    kind, pad = str(config.get("model_type", "")), config.get("pad_token_id")
    if any(name in kind for name in _SHIFTED):
        value -= (pad if type(pad) is int else 1) + 1
    longest = _optional(folder / "tokenizer_config.json").get("model_max_length")
    return min(value, longest) if type(longest) is int and longest > 2 else value


def _hidden_size(folder: Path, config: Mapping[str, object]) -> int:
    for name in ("hidden_size", "dim", "d_model", "n_embd"):
        if type(size := config.get(name)) is int:
            return size
    raise StartupError(f"{folder / 'config.json'} does not say how wide the model is (hidden_size).")


def _is_decoder(config: Mapping[str, object]) -> bool:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return str(first).endswith(_GENERATORS)


def _optional(path: Path) -> dict[str, object]:
    return _object(path) if path.is_file() else {}


def _object(path: Path) -> dict[str, object]:
    value = _json(path)
    if not isinstance(value, dict):
        raise StartupError(f"{path} does not hold a JSON object. Copy or download it again.")
    return value


def _json(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise StartupError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: not the file its name promises.")
        return json.loads(path.read_bytes())
    except OSError as exc:
        raise StartupError(f"{path} cannot be read ({exc.strerror}). Check its permissions, or get it again.") from exc
    except (ValueError, RecursionError) as exc:
        raise StartupError(f"{path} is not JSON ({exc}). Copy or download it again.") from None
