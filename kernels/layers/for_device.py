"""The small modules of a transformers model by our ops, for a card: one launch where torch makes five to ten.

A module is swapped where it is built as expected and gives the same for random numbers, whatever its class is called.
What stays is told. All of it can be undone, should the model as a whole compute something else then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.moe.experts import Experts, MoeWorkspace
from ..ops.moe.launch import moe
from ..ops.moe.launch import refusal as experts_refusal
from ..ops.rms_norm.launch import rms_norm
from ..ops.rotate.launch import rotate
from ..ops.silu_mul.launch import silu_mul
from .merged import MergedLinear

_ROTATION = "apply_rotary_pos_emb"  # as every modeling file of transformers calls it
_TOKENS = 24  # of a trial
_MLP = frozenset({"gate_proj", "up_proj", "merged_gate_up", "down_proj", "act_fn"})
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # relative error of a trial's token


class Swaps:
    """What was put in another's place, and for people what was not."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()  # by kind
        self.left: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def replace(self, parent: nn.Module, name: str, new: nn.Module, kind: str) -> None:
        """Put `new` where the parent's child `name` is."""
        old = getattr(parent, name)
        setattr(parent, name, new)
        self.done[kind] += 1
        self._undo.append(lambda: setattr(parent, name, old))

    def rebind(self, module: nn.Module, forward: FunctionType) -> None:
        """Make `forward` this one module's."""
        own = vars(module)  # found before what its class has
        own["forward"] = MethodType(forward, module)
        self.done["rotations"] += 1
        self._undo.append(lambda: own.__delitem__("forward"))

    def undo(self) -> None:
        """Restore what was there."""
        while self._undo:
            self._undo.pop()()
        self.done.clear()


def swap_modules(model: nn.Module) -> Swaps:
    """Swap norms, gated MLPs whose gate and up are merged, sparse blocks and rotations of a loaded model, in place.

    Runs each once or twice. Before linears are packed, as those of swapped modules shall be.
    """
    swaps = Swaps()
    left: Counter[str] = Counter()
    workspaces: dict[tuple[int, ...], _Workspace] = {}
    with torch.inference_mode():
        for parent, name, child in list(_children(model)):
            new = _norm(child) or _mlp(child) or _sparse(child, workspaces)
            if new is not None:
                swaps.replace(parent, name, new, type(new).__name__)
            elif type(child).__name__.endswith("Norm") or hasattr(child, "experts") or hasattr(child, "merged_gate_up"):
                left[type(child).__name__] += 1
        for module in model.modules():
            forward = type(module).forward
            if isinstance(forward, FunctionType) and _ROTATION in forward.__code__.co_names:
                mine = _rotating(forward, next(model.parameters()))
                if mine is None:
                    left[f"the rotation of {type(module).__name__}"] += 1
                else:
                    swaps.rebind(module, mine)
    if left:
        swaps.left.append(f"computed by transformers' code: {', '.join(f'{left[kind]} x {kind}' for kind in left)}")
    return swaps


def reserve(model: nn.Module, max_tokens: int) -> None:
    """Make room for steps of so many tokens in swapped sparse blocks: a graph must find it there."""
    for module in model.modules():
        if isinstance(module, DeviceSparse):
            module.reserve(max_tokens)


class DeviceNorm(nn.Module):
    """RMSNorm by our op."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., N]."""
        return rms_norm(x, self.weight, self.eps)


class DeviceMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, merged: MergedLinear, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down_proj = merged.linear, down

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        both = self.gate_up(x)
        inner = torch.empty((*both.shape[:-1], both.shape[-1] // 2), dtype=both.dtype, device=both.device)
        silu_mul(both.view(-1, both.shape[-1]), inner.view(-1, inner.shape[-1]))
        out: Tensor = self.down_proj(inner)
        return out


class _Workspace:
    """The memory that sparse blocks of one size share; grows."""

    def __init__(self) -> None:
        self._made: MoeWorkspace | None = None

    def of(self, experts: Experts, tokens: int) -> MoeWorkspace:
        if self._made is None or not self._made.fits(experts, tokens):
            self._made = MoeWorkspace(experts, max_tokens=tokens)
        return self._made


class DeviceSparse(nn.Module):
    """A router and its experts by our fused op."""

    def __init__(self, experts: Experts, workspace: _Workspace) -> None:
        super().__init__()
        self.router = nn.Parameter(experts.router_EH, requires_grad=False)
        self.gate_up = nn.Parameter(experts.gate_up_EIH, requires_grad=False)
        self.down = nn.Parameter(experts.down_EHI, requires_grad=False)
        self._experts, self._workspace = experts, workspace

    def reserve(self, max_tokens: int) -> None:
        """Room for steps of so many tokens."""
        self._workspace.of(self._experts, max_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        parts = moe(rows, self._experts, self._workspace.of(self._experts, rows.shape[0]))
        return parts.data[: parts.count].sum(0, dtype=torch.float32).to(x.dtype).view(x.shape)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _same(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any], like: Tensor, *, chooses: bool = False) -> bool:
    """Whether both give the same for random tokens of the size of a row of `like`, small ones and large. Their mean is
    not 0: what subtracts it must not pass for an RMSNorm. `chooses`: of near-equal experts either may be taken.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    x = torch.randn(1, _TOKENS, like.shape[-1], device=like.device, generator=generator) + 1.0
    x = (x * torch.logspace(-3, 1, _TOKENS, device=like.device)[:, None]).to(like.dtype)
    try:
        wanted, found = one(x.clone()), other(x.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants more than the tokens
        return False
    return isinstance(wanted, Tensor) and wanted.shape == found.shape and _near(found, wanted, chooses=chooses)


def _near(found: Tensor, wanted: Tensor, *, chooses: bool = False) -> bool:
    error = (found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1).clamp_min(1e-12)
    return bool((error.median() if chooses else error.max()) <= _TOLERANCE[wanted.dtype])


def _is_silu(activation: object, like: Tensor) -> bool:
    """By its values: near 0 all activations of the kind are alike, so that a trial of small numbers would not tell."""
    if not isinstance(activation, nn.Module):
        return False
    x = torch.linspace(-8.0, 8.0, 65, device=like.device)
    return torch.allclose(activation(x), nn.functional.silu(x), atol=1e-5, rtol=1e-5)


def _norm(module: nn.Module) -> DeviceNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = [name for name, _ in module.named_parameters()]
    if own != ["weight"] or not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    for scale in (weight.data, 1.0 + weight.data.float()):  # Gemma's weights are counted from 1
        norm = DeviceNorm(scale, eps)
        if _same(module, norm, weight):
            return norm
    return None


def _mlp(module: nn.Module) -> DeviceMlp | None:
    merged: Any = getattr(module, "merged_gate_up", None)
    if not isinstance(merged, MergedLinear) or {name for name, _ in module.named_children()} != _MLP:
        return None
    mlp = DeviceMlp(merged, module.get_submodule("down_proj"))
    weight = merged.linear.weight
    return mlp if _is_silu(module.act_fn, weight) and _same(module, mlp, weight) else None


def _sparse(module: Any, workspaces: dict[tuple[int, ...], _Workspace]) -> DeviceSparse | None:
    if {name for name, _ in module.named_children()} != {"gate", "experts"}:
        return None
    router, weights = (dict(child.named_parameters()) for child in (module.gate, module.experts))
    top_k = getattr(module.gate, "top_k", None)
    if set(router) != {"weight"} or set(weights) != {"gate_up_proj", "down_proj"} or not isinstance(top_k, int):
        return None
    if not _is_silu(getattr(module.experts, "act_fn", None), router["weight"]):
        return None
    tensors = (router["weight"].data, weights["gate_up_proj"].data, weights["down_proj"].data)
    for renormalise in (True, False):
        try:
            experts = Experts(*tensors, top_k, renormalise)
        except ValueError:
            return None
        if experts_refusal(experts.num_experts, experts.hidden, experts.intermediate) is not None:
            return None
        sizes = (experts.num_experts, experts.hidden, experts.intermediate, top_k)
        sparse = DeviceSparse(experts, workspaces.setdefault(sizes, _Workspace()))
        if _same(module, sparse, tensors[0], chooses=True):
            return sparse
    return None


def _rotating(forward: FunctionType, like: Tensor) -> FunctionType | None:
    """This forward with our rotation in place of its modeling file's; None where that does something else."""
    theirs = forward.__globals__.get(_ROTATION)
    if theirs is None:
        return None

    def mine(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """[1, H, T, D], [1, G, T, D], angles [1, T, D]; in place."""
        alike = query.shape[-1] == key.shape[-1] == cos.shape[-1] and query.shape[0] == cos.shape[0] == 1
        if rest or more or not alike or cos.dim() != 3:
            found: tuple[Tensor, Tensor] = theirs(query, key, cos, sin, *rest, **more)
            return found
        for heads in (query, key):
            rotate(heads[0].transpose(0, 1), cos[0], sin[0])
        return query, key

    generator = torch.Generator(device=like.device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=like.dtype, device=like.device, generator=generator)

    query, key = (random(1, _TOKENS, heads, 8).transpose(1, 2) for heads in (2, 1))
    cos, sin = (torch.cat((half, half), -1) for half in (random(1, _TOKENS, 4), random(1, _TOKENS, 4)))
    try:
        wanted = theirs(query, key, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return None
    found = mine(query.clone(), key.clone(), cos, sin)
    if len(wanted) != 2 or not all(_near(*pair) for pair in zip(found, wanted, strict=True)):
        return None
    globals_of = forward.__globals__ | {_ROTATION: mine}
    rebound = FunctionType(forward.__code__, globals_of, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound
