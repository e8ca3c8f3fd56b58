"""A model folder as what makes vectors or scores of whole texts: encoders and decoders alike, by transformers' code.

Called by cluster/engine. All texts of a step lie in one ragged row, sorted by length; a model that cannot be computed
so is found out when it is loaded, and gets texts of equal length together instead. Holds no KV, knows no requests.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diptych.protos.embedding import TextRow
from diptych.protos.errors import StartupError

from . import rows
from .layers.merged import MERGED_NAMES, merge_linears
from .model import DTYPES, fill_computed_buffers, read_config
from .random_weights import allocate_parameters, seeded
from .rows import KEYWORD, NotRagged, Run, runs_of
from .weights import load_weights

Pooling = Literal["mean", "cls", "last"]

# What a checkpoint may hold beside the parts that texts need.
_OTHER_HEADS = (r"^(.*\.)?pooler\.", r"^cls\.", r"^lm_head\.", r"position_ids$", r"rotary_emb\.inv_freq$")
_MERGED = (*MERGED_NAMES, ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_NO_PADDING = -1  # no token is this one: texts are never padded here
_PROBE_LENGTHS = (3, 5, 5, 9)
# Relative error of a text's numbers: far below what a wrong computation gives, above what another order of sums does.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """What is made of a text. `scores`: by the model's own head, one number; else a vector, pooled and of length 1
    where it is to `normalize`.
    """

    scores: bool = False
    pooling: Pooling = "mean"
    normalize: bool = True


class TextModel:
    """A model ready to run. One thread at a time."""

    def __init__(
        self, module: nn.Module, spec: TextSpec, *, device: torch.device, width: int, offset: int | None
    ) -> None:
        self.module = module
        self.spec = spec
        self.device = device
        self.width = width  # numbers of a text
        self.degraded: tuple[str, ...] = ()
        self._base = getattr(module, "base_model", module)
        self._offset = offset  # of the first position; None: texts of equal length are computed together
        takes_types = "token_type_ids" in inspect.signature(self._base.forward).parameters
        self._has_types = takes_types and getattr(module.config, "type_vocab_size", 0) > 1

    @property
    def is_ragged(self) -> bool:
        """Whether texts of any lengths are one row."""
        return self._offset is not None

    def compute(self, texts: Sequence[TextRow], skip: int = 0) -> NDArray[np.float32]:
        """[N, width], float32, in the order of `texts`; `skip` tokens at the front of each are left out of a mean.

        What is not finite is the caller's to find.
        """
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at].ids))
        found = np.empty((len(texts), self.width), dtype=np.float32)
        with torch.inference_mode():
            values = self._of_sorted([texts[at] for at in order], skip)
            found[order] = values.float().cpu().numpy()
        return found

    def _of_sorted(self, texts: Sequence[TextRow], skip: int) -> Tensor:
        if self._offset is not None:
            return self._ragged(texts, skip, self._offset)
        parts = [self._dense(list(run), skip) for _, run in itertools.groupby(texts, key=lambda text: len(text.ids))]
        return torch.cat(parts)

    def _ragged(self, texts: Sequence[TextRow], skip: int, offset: int) -> Tensor:
        lengths = [len(text.ids) for text in texts]
        runs = runs_of(lengths, self.device)
        positions = [torch.arange(offset, offset + length) for length in lengths]
        inputs = self._inputs(texts, 1)
        inputs["position_ids"] = torch.cat(positions).to(self.device)[None]
        hidden_TW = self._base(**inputs, use_cache=False, **{KEYWORD: runs}).last_hidden_state[0]
        if self.spec.scores:
            return self._headed(_picked(hidden_TW, lengths, is_last=_is_causal(self.module)))
        if self.spec.pooling == "mean":
            return self._finished(torch.cat([_mean_of_run(hidden_TW, run, skip) for run in runs]))
        return self._finished(_picked(hidden_TW, lengths, is_last=self.spec.pooling == "last"))

    def _dense(self, texts: Sequence[TextRow], skip: int) -> Tensor:
        inputs = self._inputs(texts, len(texts))
        if self.spec.scores:
            logits: Tensor = self.module(**inputs, **self._no_cache()).logits
            return logits
        return self._finished(self._pooled(self._base(**inputs, **self._no_cache()).last_hidden_state, skip))

    def _no_cache(self) -> dict[str, bool]:
        has_it = getattr(self.module.config, "use_cache", None) is not None
        return {"use_cache": False} if has_it else {}

    def _inputs(self, texts: Sequence[TextRow], num_rows: int) -> dict[str, Tensor]:
        ids = torch.tensor([token for text in texts for token in text.ids], dtype=torch.long)
        inputs = {"input_ids": ids.view(num_rows, -1).to(self.device)}
        if self._has_types and any(text.second for text in texts):
            types = [int(0 < text.second <= at) for text in texts for at in range(len(text.ids))]
            inputs["token_type_ids"] = torch.tensor(types, dtype=torch.long).view(num_rows, -1).to(self.device)
        return inputs

    def _pooled(self, hidden_NLW: Tensor, skip: int) -> Tensor:
        if self.spec.pooling == "cls":
            return hidden_NLW[:, 0]
        if self.spec.pooling == "last":
            return hidden_NLW[:, -1]
        return _mean(hidden_NLW, skip)

    def _finished(self, pooled_NW: Tensor) -> Tensor:
        pooled_NW = pooled_NW.float()
        return functional.normalize(pooled_NW, dim=-1) if self.spec.normalize else pooled_NW

    def _headed(self, picked_NW: Tensor) -> Tensor:
        """The model's own head on the tokens that it reads, as if each text were that one token."""
        prefix = getattr(self.module, "base_model_prefix", "")
        base = self.module._modules[prefix]
        assert base is not None
        self.module._modules[prefix] = _Given(picked_NW[:, None], getattr(base, "pooler", None))
        try:
            ids = torch.zeros((len(picked_NW), 1), dtype=torch.long, device=self.device)
            logits: Tensor = self.module(input_ids=ids).logits
        finally:
            self.module._modules[prefix] = base
        return logits


class _Given(nn.Module):
    """Stands where the base model stood, with what that one has computed."""

    def __init__(self, hidden: Tensor, pooler: nn.Module | None) -> None:
        super().__init__()
        self._hidden = hidden
        self._pooler = [pooler]  # not a child: its parameters are the base model's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What every base model of transformers gives."""
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        [pooler] = self._pooler
        pooled = pooler(self._hidden) if pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=self._hidden, pooler_output=pooled)


def load_text_model(
    folder: Path, spec: TextSpec, *, dtype: str, device: str = "cpu", random_seed: int | None = None
) -> TextModel:
    """Build and fill the model in `folder`. StartupError says why one is refused. With `random_seed` config.json is the
    only file read.
    """
    place, numbers = torch.device(device), DTYPES[dtype]
    config = read_config(folder)
    module = _build(config, spec, numbers)
    with torch.inference_mode():
        if random_seed is None:
            prefix = getattr(module, "base_model_prefix", "model")
            load_weights(module, folder, device=place, prefix=prefix, ignorable=_ignorable(spec))
            fill_computed_buffers(module, place)
        else:
            allocate_parameters(module, place)
            with seeded(random_seed, place):
                fill_computed_buffers(module, place)
    text = config.get_text_config()
    width = 1 if spec.scores else int(text.hidden_size)
    return _fastest(module, spec, device=place, width=width)


def _ignorable(spec: TextSpec) -> tuple[str, ...]:
    return _OTHER_HEADS[1:] if spec.scores else (*_OTHER_HEADS, r"^classifier\.", r"^score\.")


def _build(config: Any, spec: TextSpec, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel, AutoModelForSequenceClassification

    if getattr(config, "is_encoder_decoder", False):
        raise StartupError(f"a model of type {config.model_type} has an encoder and a decoder; those are not embedded.")
    auto: Any = AutoModelForSequenceClassification if spec.scores else AutoModel
    try:
        with torch.device("meta"):
            module: nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError) as exc:
        what = "a classifier of texts" if spec.scores else "a model of texts"
        raise StartupError(f"transformers cannot build {what} of type {config.model_type}: {exc}") from exc
    if not spec.scores and getattr(module, "pooler", None) is not None:
        module.pooler = None  # type: ignore[assignment]  # of another training; pooling is done here
    return module.eval()


def _fastest(module: nn.Module, spec: TextSpec, *, device: torch.device, width: int) -> TextModel:
    """As one ragged row where that gives what transformers' own attention gives, else by equal lengths."""
    name, config = type(module).__name__, cast("Any", module.config)
    offsets = dict.fromkeys((0, (getattr(config, "pad_token_id", None) or 0) + 1, 2))
    if spec.scores:
        config.pad_token_id = _NO_PADDING
    plain = TextModel(module, spec, device=device, width=width, offset=None)
    texts = _probe(int(config.get_text_config().vocab_size), has_pairs=spec.scores)
    try:
        expected = plain.compute(texts)
    except Exception as exc:  # whatever transformers' code raises when it cannot run like this
        raise StartupError(f"{name} is refused: it cannot compute a text without a cache: {exc!r}") from exc
    if expected.shape != (len(texts), width) or not np.isfinite(expected).all():
        raise StartupError(f"{name} is refused: of a text it makes numbers that are not finite, or too many.")
    own, rows_name = config._attn_implementation, rows.IMPLEMENTATION
    rows.register()
    merge_linears(module, _MERGED)
    tolerance = _TOLERANCE[next(module.parameters()).dtype]
    try:
        module.set_attn_implementation(rows_name)  # type: ignore[operator]
        for offset in offsets:
            ragged = TextModel(module, spec, device=device, width=width, offset=offset)
            if not _differs(ragged.compute, texts, expected, tolerance):
                return ragged
        reason = "as one ragged row it computes something else"
    except (AttributeError, IndexError, NotRagged, RuntimeError, TypeError, ValueError) as exc:
        reason = f"it does not run as one ragged row ({str(exc).splitlines()[0][:160]})"
    module.set_attn_implementation(own)  # type: ignore[operator]
    if _differs(plain.compute, texts, expected, tolerance):
        raise StartupError(f"{name} is refused: merging its linears changes what it computes.")
    plain.degraded = (f"{name}: texts of equal length are computed together, not all of a step at once: {reason}",)
    return plain


def _differs(
    compute: Callable[[Sequence[TextRow]], NDArray[np.float32]],
    texts: Sequence[TextRow],
    expected: NDArray[np.float32],
    tolerance: float,
) -> bool:
    error = np.abs(compute(texts) - expected).max(axis=-1) / np.maximum(np.abs(expected).max(axis=-1), 1e-12)
    return not bool((error <= tolerance).all())


def _probe(vocab_size: int, *, has_pairs: bool) -> list[TextRow]:
    texts = []
    for number, length in enumerate(_PROBE_LENGTHS):
        ids = [(7 * number + 3 * (at + 1)) % vocab_size for at in range(length)]
        texts.append(TextRow(ids, length // 2 if has_pairs else 0))
    return texts


def _is_causal(module: nn.Module) -> bool:
    """Whether a classifier reads the last token of a text, as decoders do; others read the first."""
    return hasattr(module, "score")


def _mean(hidden_NLW: Tensor, skip: int) -> Tensor:
    """Of texts of one length; the last token counts however many are skipped."""
    return hidden_NLW[:, min(skip, hidden_NLW.shape[1] - 1) :].float().mean(dim=1)


def _mean_of_run(hidden_TW: Tensor, run: Run, skip: int) -> Tensor:
    if run.padding is None:
        return _mean(run.dense(hidden_TW), skip)
    is_text_NL = run.padding.is_text_NL
    length_N1 = is_text_NL.sum(dim=1, keepdim=True)
    counts_NL = is_text_NL & (torch.arange(run.length, device=hidden_TW.device) >= length_N1.sub(1).clamp(max=skip))
    weight_NL = counts_NL / counts_NL.sum(dim=1, keepdim=True)
    return (run.dense(hidden_TW).float() * weight_NL[:, :, None]).sum(dim=1)


def _picked(hidden_TW: Tensor, lengths: Sequence[int], *, is_last: bool) -> Tensor:
    """The last or the first token of each text."""
    ends = list(itertools.accumulate(lengths))
    places = [end - 1 if is_last else end - length for end, length in zip(ends, lengths, strict=True)]
    return hidden_TW[torch.tensor(places, device=hidden_TW.device)]
