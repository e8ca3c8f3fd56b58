"""Small modules swapped for our ops: the model computes what it did, what stays is told, and all can be undone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.kernels import attention, model
from diptych.kernels.attention import run_module
from diptych.kernels.layers import for_device
from diptych.kernels.layers.for_device import Swaps, reserve, swap_modules
from diptych.kernels.layers.merged import merge_linears
from diptych.kernels.model import load_model
from diptych.kernels.probe import Probe, compute_alone, compute_ragged, find_layers
from diptych.kernels.testing import ARCHITECTURES, TinyArchitecture
from diptych.protos.errors import StartupError

# norms, MLPs, sparse blocks, rotations of a tiny model of each family; what must be told as left.
SWAPPED: dict[str, tuple[tuple[int, int, int, int], tuple[str, ...]]] = {
    "llama": ((7, 3, 0, 3), ()),
    "mistral": ((7, 3, 0, 3), ()),
    "qwen2": ((5, 2, 0, 2), ()),
    "qwen3": ((9, 2, 0, 2), ()),
    "qwen3-moe": ((9, 1, 1, 2), ()),
    "mixtral": ((5, 0, 2, 2), ()),
    "olmoe": ((9, 0, 2, 2), ()),
    "gemma2": ((17, 0, 0, 4), ("4 x Gemma2MLP",)),
    "gemma3": ((25, 0, 0, 4), ("4 x Gemma3MLP",)),
    "phi3": ((5, 0, 0, 2), ()),
    "olmo2": ((9, 2, 0, 2), ()),
    "gpt2": ((0, 0, 0, 0), ("5 x LayerNorm",)),
    "gpt-oss": ((9, 0, 0, 0), ("4 x GptOssMLP", "4 x the rotation of GptOssAttention")),
}
_OLMOE = TinyArchitecture("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32})


def built(name: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With our attention, linears merged and not yet packed."""
    from transformers import AutoModelForCausalLM

    attention.register()
    folder = (ARCHITECTURES | {"olmoe": _OLMOE})[name].make(tmp_path / "model")
    load: Any = AutoModelForCausalLM.from_pretrained
    module: nn.Module = load(folder, dtype=dtype, attn_implementation=attention.IMPLEMENTATION)
    merge_linears(module)
    return module.eval()


def logits_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    config: Any = module.config
    text = config.get_text_config()
    probe = Probe(dtype, torch.device("cpu"))
    with torch.inference_mode():
        shapes = find_layers(module, text, probe.device)
        compute = partial(run_module, module)
        return [one(compute, text.vocab_size, shapes, probe) for one in (compute_alone, compute_ragged)]


def counts(swaps: Swaps) -> tuple[int, ...]:
    return tuple(swaps.done[kind] for kind in ("DeviceNorm", "DeviceMlp", "DeviceSparse", "rotations"))


@pytest.mark.parametrize("name", SWAPPED)
def test_a_swapped_model_computes_the_same_and_says_what_stayed(name: str, tmp_path: Path) -> None:
    module = built(name, tmp_path)
    wanted = logits_of(module)
    swaps = swap_modules(module)
    number, told = SWAPPED[name]
    assert (counts(swaps), len(swaps.left)) == (number, 1 if told else 0)
    assert all(part in swaps.left[0] for part in told)
    for found, right in zip(logits_of(module), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=2e-4, rtol=2e-4)
    swaps.undo()
    assert not any(isinstance(one, (for_device.DeviceNorm, for_device.DeviceMlp)) for one in module.modules())
    assert all(torch.equal(*pair) for pair in zip(logits_of(module), wanted, strict=True))


def test_a_sparse_block_serves_steps_of_all_sizes_and_finds_room_for_the_largest(tmp_path: Path) -> None:
    module = built("olmoe", tmp_path)
    blocks = [layer.mlp for layer in module.get_submodule("model").layers]  # type: ignore[union-attr]
    swap_modules(module)
    swapped = [layer.mlp for layer in module.get_submodule("model").layers]  # type: ignore[union-attr]
    reserve(module, 40)
    rooms = {id(one._workspace.of(one._experts, 40)) for one in swapped}
    with torch.inference_mode():
        for tokens in (1, 40, 7):
            x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens))
            for mine, theirs in zip(swapped, blocks, strict=True):
                torch.testing.assert_close(mine(x), theirs(x), atol=1e-4, rtol=1e-4)
    assert rooms == {id(one._workspace.of(one._experts, 40)) for one in swapped}
    assert len(rooms) == 1


def test_rotation_is_left_to_transformers_where_a_call_is_unusual(tmp_path: Path) -> None:
    """Angles of another size than the head, or of another form, must not come to our op."""
    module = built("llama", tmp_path)
    attn: Any = module.get_submodule("model.layers.0.self_attn")
    forward = type(attn).forward
    theirs = forward.__globals__["apply_rotary_pos_emb"]
    swap_modules(module)
    mine = attn.forward.__globals__["apply_rotary_pos_emb"]
    assert mine is not theirs
    assert forward.__globals__["apply_rotary_pos_emb"] is theirs  # nobody else's is changed
    query, key = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)  # tokens before heads
    cos, sin = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    for found, wanted in zip(
        mine(query.clone(), key.clone(), cos, sin, unsqueeze_dim=2), theirs(query, key, cos, sin, 2), strict=True
    ):
        assert torch.equal(found, wanted)


def test_a_model_that_computes_something_else_with_our_modules_keeps_its_own(tmp_path: Path) -> None:
    module = built("olmo2", tmp_path)
    config: Any = module.config
    probe = Probe(torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        shapes = find_layers(module, config, probe.device)
        expected = compute_alone(partial(run_module, module), config.vocab_size, shapes, probe)
        swaps = swap_modules(module)
        norm: Any = module.get_submodule("model.layers.1.post_attention_layernorm")
        norm.weight.data = norm.weight.data.flip(0) * 3
        degraded: list[str] = []
        compute = model._choose_forward(module, config.vocab_size, shapes, probe, expected, degraded, swaps)
        assert degraded == [
            "Olmo2ForCausalLM keeps its own norms, MLPs and rotation: with ours it computes something else"
        ]
        assert torch.equal(compute_alone(compute, config.vocab_size, shapes, probe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_on_a_card_every_family_is_served_and_what_is_slow_is_told(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].make(tmp_path / "model")
    try:
        loaded = load_model(folder, dtype="bfloat16", device="cuda:0", by_hand=False)
    except StartupError as exc:
        pytest.fail(f"refused on a card, served on the CPU: {exc}")
    _, told = SWAPPED.get(name, ((), ()))
    assert all(any(part in reason for reason in loaded.degraded) for part in told)
    assert not any("keeps its own" in reason for reason in loaded.degraded)


class CentredNorm(nn.Module):
    """Looks like an RMSNorm and subtracts the mean first, as Cohere's does."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, None, self.variance_epsilon)


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(ins, outs, bias=False, dtype=dtype) for ins, outs in ((96, 64), (96, 64), (64, 96))
        )
        self.act_fn = activation
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=1e-3, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_that_only_looks_like_ours_stays(dtype: torch.dtype) -> None:
    """In bfloat16 and for numbers whose mean is 0, 4,096 of them hide what is subtracted."""
    model = nn.Sequential(CentredNorm(4096, dtype), nn.RMSNorm(4096, eps=1e-5, dtype=dtype))
    swaps = swap_modules(model)
    assert type(model[0]) is CentredNorm
    assert isinstance(model[1], for_device.DeviceNorm)
    assert swaps.left == ["computed by transformers' code: 1 x CentredNorm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_that_is_only_near_ours_stays(dtype: torch.dtype) -> None:
    """Near 0 all of them are half their argument, which small weights would not tell apart."""
    model = nn.Sequential(Mlp(nn.GELU(), dtype), Mlp(nn.SiLU(), dtype))
    merge_linears(model)
    swaps = swap_modules(model)
    assert type(model[0]) is Mlp
    assert isinstance(model[1], for_device.DeviceMlp)
    assert swaps.left == ["computed by transformers' code: 1 x Mlp"]
