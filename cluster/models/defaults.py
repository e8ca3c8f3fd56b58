"""What a model's generation_config.json wants where a request says nothing. Read by facts.py, applied by the API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from diptych.protos.errors import StartupError

# Keys that say nothing about sampling, or are honoured elsewhere (the token ids).
_NEUTRAL = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "do_sample"}
)
_RANGES: dict[str, tuple[float, float]] = {  # least and most, as requests may have them
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1.0, 2.0**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values for fields that a request does not give. None: the model names none."""

    temperature: float | None = None  # 0 where the model says do_sample: false
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignored: tuple[str, ...] = ()  # other keys of the file, which have no effect here

    def given(self) -> dict[str, float]:
        """Those that the model names."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "ignored"}
        return {name: value for name, value in named.items() if value is not None}


NO_DEFAULTS = SamplingDefaults()


def read_defaults(path: Path, config: Mapping[str, object]) -> SamplingDefaults:
    """From the parsed generation_config.json at `path`. Raises StartupError naming the key of a value out of range."""
    found: dict[str, float] = {}
    for key, (least, most) in _RANGES.items():
        value = config.get(key)
        if value is None:
            continue
        wrong_type = isinstance(value, bool) or not isinstance(value, int if key == "top_k" else int | float)
        if wrong_type or not least <= value <= most or (key == "top_p" and value == 0):  # type: ignore[operator]
            raise StartupError(
                f"{path}: {key} is {value!r}, which no request could ask for ({least:g} to {most:g}). Restore the "
                "generation_config.json that belongs to this model, or remove the key."
            )
        assert isinstance(value, int | float)
        found[key] = value
    do_sample = config.get("do_sample")
    if do_sample not in (None, True, False):
        raise StartupError(f"{path}: do_sample is {do_sample!r}, neither true nor false. Correct or remove the key.")
    top_k = found.pop("top_k", None)
    if do_sample is False:
        found["temperature"] = 0.0
    return SamplingDefaults(
        **found,
        top_k=None if top_k is None else max(int(top_k), 0),
        ignored=tuple(sorted(key for key in config if key not in _RANGES and key not in _NEUTRAL and config[key])),
    )
