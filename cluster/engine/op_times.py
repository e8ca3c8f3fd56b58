"""The ops of the floor below, timed on this machine's card: the way to them for `diptych bench kernels`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diptych.kernels.ops.cases import Case, benches
from diptych.kernels.ops.measure import Ceilings, ceilings, measure, too_little_memory
from diptych.protos.errors import StartupError


def time_ops(
    ops: Sequence[str], tell: Callable[[str], None], keep: Callable[[dict[str, Any]], None], *, is_tuned: bool
) -> dict[str, Any]:
    """Measure every case of these ops (none: of all): {"ceilings": ..., "op case": figures}, each told as it comes, and
    what there is so far kept after each. A case that fails has an "error", and the others go on. With `is_tuned`
    their launch tables are found first. StartupError: no card, no such op.
    """
    if not torch.cuda.is_available():
        raise StartupError("bench kernels measures a CUDA device, and torch finds none here")
    found = benches()
    if unknown := [op for op in ops if op not in found]:
        raise StartupError(f"no op {unknown[0]!r} is measured; there are {', '.join(sorted(found))}")
    device = torch.device("cuda", torch.cuda.current_device())
    modules = {op: found[op] for op in ops or sorted(found)}
    limits = ceilings(device)
    tell(f"ceilings: copy {limits.copy_gb_s:,} GB/s, product {limits.product_tflop_s} TFLOP/s")
    if is_tuned:
        from diptych.kernels.ops.tuning import tune

        tune(
            (trial for module in modules.values() if hasattr(module, "trials") for trial in module.trials(device)), tell
        )
    result: dict[str, Any] = {"ceilings": {"copy_gb_s": limits.copy_gb_s, "product_tflop_s": limits.product_tflop_s}}
    for op, module in modules.items():
        for case in module.cases(device):
            figures = too_little_memory(case) or _measured(case, limits)
            result[f"{op} {case.name}"] = figures
            tell(_line(f"{op} {case.name}", figures))
            keep(result)
        torch.cuda.empty_cache()  # of this op's inputs
    return result


def _measured(case: Case, limits: Ceilings) -> dict[str, Any]:
    try:
        return measure(case, limits)
    except (RuntimeError, ValueError, AssertionError) as exc:  # a kernel's defect is a line of the table, not its end
        return {"error": (str(exc) or type(exc).__name__).splitlines()[0][:200]}


def card() -> dict[str, Any]:
    """What was measured on."""
    return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _line(name: str, figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"{name:<44}{figures['error']}"
    peers = "".join(
        f"  {peer} {told['us']:,.1f} us" if "us" in told else f"  {peer}: {told['error']}"
        for peer, told in figures.get("peers", {}).items()
    )
    if "of_best_peer" in figures:
        peers += f"  x {figures['of_best_peer']:.2f}"
    rate = f"{figures['tflop_s']:>9,.1f} TFLOP/s" if "tflop_s" in figures else f"{figures['gb_s']:>9,.1f} GB/s   "
    return f"{name:<44}{figures['us']:>11,.1f} us{rate}{figures['of_ceiling']:>7.1%}{peers}"
