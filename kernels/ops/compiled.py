"""Launches a Triton kernel: the first time through Triton's own front door, then the compiled one directly.

On an H200 with Triton 3.6 the front door (JITFunction.run) takes the host 11 us and the compiled kernel 7: an eager
step of 400 launches saves 2 ms. Kernels keep two rules: parameters that vary come first, constants last; every integer
that varies from step to step is in `do_not_specialize`, or a new row count would compile a variant while serving.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Whose compiled kernels take (grid, stream, function, metadata, hooks, every parameter): looked up in its sources.
_DIRECT = triton.__version__.startswith("3.6.")
_ALIGNMENT = 16  # bytes: what Triton takes for granted of pointers that were so at the first launch


class _Known(NamedTuple):
    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


_known: dict[tuple[Any, ...], _Known] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Tensor | int | float | None, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Run `kernel` on the current stream of its first tensor's device. `args` are its first parameters in order,
    `constants` all its others (constexpr). Neither may hold a default. A grid with a 0 launches nothing.
    """
    if 0 in grid:
        return
    first = args[0]
    assert isinstance(first, Tensor)
    if not (_DIRECT and first.is_cuda):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    device = first.get_device()
    pointers, kinds = 0, []
    for at, arg in enumerate(args):
        if isinstance(arg, Tensor):
            pointers |= arg.data_ptr()
            kinds.append(arg.dtype)
        elif isinstance(arg, int) and not kernel.params[at].do_not_specialize:
            kinds.append((arg == 1, arg % _ALIGNMENT == 0, -(2**31) <= arg < 2**31))
        else:
            kinds.append(type(arg))
    if pointers % _ALIGNMENT:  # rare: a variant of its own, which Triton finds
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    key = (id(kernel), device, num_warps, num_stages, *kinds, *constants.items())
    known = _known.get(key)
    if known is None:
        compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        tail = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _known[key] = _Known(compiled.run, compiled.function, compiled.packed_metadata, tail)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    known.run(*grid, stream, known.function, known.metadata, None, None, None, *args, *known.constants)
