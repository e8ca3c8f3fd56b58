"""Launches a Triton kernel: the first time through Triton's own front door, then the compiled one directly.

On an H200 with Triton 3.6 the front door (JITFunction.run) takes the host 11 us and the compiled kernel 7: an eager
step of 400 launches saves 2 ms. Kernels keep two rules: parameters that vary come first, constants last; every integer
that varies from step to step is in `do_not_specialize`, or a new row count would compile a variant while serving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Whose C launcher takes (grid, stream, function, flags, scratch, metadata, hooks, all parameters), by its sources.
_DIRECT = triton.__version__.startswith("3.6.")
_ALIGNMENT = 16  # bytes: what Triton takes for granted of pointers that were so at the first launch


class _Known(NamedTuple):
    launch: Callable[..., None]  # the C function that Triton made for this signature
    before: tuple[Any, ...]  # what it takes before the kernel's parameters
    after: tuple[Any, ...]  # the constants, which it skips


_known: dict[tuple[Any, ...], _Known] = {}
_ahead: ContextVar[set[tuple[Any, ...]] | None] = ContextVar("variants asked for ahead", default=None)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Run `kernel` on the current stream of its first argument's device. `args` are its first parameters in order:
    tensors, the first of them one, integers, floats, None, or tensor descriptors, whose blocks and dtype must follow
    from the rest. `constants` are all its other parameters (constexpr); none may be left to a default. A grid with a 0
    launches nothing.
    """
    if 0 in grid:
        return
    if (asked := _ahead.get()) is not None:
        _ask(asked, kernel, args, {"num_warps": num_warps, "num_stages": num_stages, **constants})
        return
    first: Tensor = args[0]
    device = first.get_device()  # -1: the CPU, under the interpreter
    if device < 0 or not _DIRECT:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    key: list[Any] = [id(kernel), device, num_warps, num_stages, *constants.items()]
    values: list[Any] = []
    pointers = 0
    for at, arg in enumerate(args):
        value = arg
        if isinstance(arg, Tensor):
            value = arg.data_ptr()  # a number is not looked up by the driver again
            pointers |= value
            key.append(arg.dtype)
        elif isinstance(arg, int) and not kernel.params[at].do_not_specialize:
            key.append((arg == 1, arg % _ALIGNMENT == 0, arg >> 31))
        else:
            key.append(type(arg))
        values.append(value)
    known = None if pointers % _ALIGNMENT else _known.get(tuple(key))
    if known is None:
        compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        if not pointers % _ALIGNMENT:  # else a variant of its own, and rare: left to Triton
            _remember(tuple(key), compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :]))
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    known.launch(*grid, stream, *known.before, *values, *known.after)


@contextlib.contextmanager
def ahead(executor: Executor) -> Iterator[None]:
    """Until the block ends, which waits for them, the variants that this thread's launches need are compiled by
    `executor`, and nothing is launched. One that cannot be compiled fails at its launch.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    token = _ahead.set(set())
    try:
        with AsyncCompileMode(executor, ignore_errors=True):
            yield
    finally:
        _ahead.reset(token)


def _ask(asked: set[tuple[Any, ...]], kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Once for each variant. What a tensor holds does not matter, and Triton takes its address for aligned."""
    key: list[Any] = [id(kernel), *options.items()]
    for at, arg in enumerate(args):
        if isinstance(arg, Tensor):
            key.append(arg.dtype)
        elif isinstance(arg, int) and not kernel.params[at].do_not_specialize:
            key.append((arg == 1, arg % _ALIGNMENT == 0, arg >> 31))
        else:
            key.append(type(arg))
    if tuple(key) not in asked:
        asked.add(tuple(key))
        dtypes = (arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
        kernel.warmup(*dtypes, grid=(1, 1, 1), **options)


def _remember(key: tuple[Any, ...], compiled: Any, constants: tuple[Any, ...]) -> None:
    """A kernel that wants scratch memory for each launch stays with Triton's own way."""
    made = compiled.run
    if made.global_scratch_size or made.profile_scratch_size:
        return
    before = (compiled.function, made.launch_cooperative_grid, made.launch_pdl, None, None)
    _known[key] = _Known(made.launch, (*before, compiled.packed_metadata, None, None, None), constants)
