"""Requests through a device's runner, over a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diptych.kernels.device.build import StepLimits, build_runner
from diptych.kernels.device.runner import DeviceOptions, DeviceRunner
from diptych.kernels.device.testing import BLOCK, Request
from diptych.kernels.model import LoadedModel
from diptych.protos.step import SampleSpec, StepPlan


def generate(runner: DeviceRunner, one: Request, others: Sequence[Request], chunk: int) -> list[tuple[int, Any]]:
    """What `one` gets, with the logprobs of its tokens, beside others that begin with it; prompts come in chunks."""
    found, step = [], 0
    while len(one.tokens) < one.new:
        turn = [request for request in (*others, one) if len(request.tokens) < request.new]
        rows = tuple(request.next_row(chunk) for request in turn)
        runner.launch(StepPlan(step, rows))
        result = runner.collect()
        assert not result.faults
        for at, (request, token) in enumerate(zip(turn, result.tokens, strict=True)):
            if token is not None:
                request.tokens.append(token)
                request.pending -= 1
                if request is one:
                    found.append((token, result.logprobs[at]))
        step += 1
    return found


def requests_of(count: int, length: int, new: int, vocab: int) -> list[Request]:
    spec = SampleSpec(0.0, 1.0, 0, 0, 0, logprobs=3)
    made = []
    for slot in range(count):
        size = length - 7 * slot
        prompt = tuple((31 * position + 7 * slot) % (vocab - 1) for position in range(size))
        each = -(-(length + new) // BLOCK)
        made.append(Request(prompt, slot, list(range(each * slot, each * (slot + 1))), new, spec))
    return made


def runner_of(model: LoadedModel, place: torch.device, *, blocks: int, step_tokens: int, graphs: bool) -> DeviceRunner:
    shape = (blocks + 1, model.kv_heads, BLOCK, model.head_dim)
    dtype = getattr(torch, model.dtype)
    kv = [tuple(torch.zeros(shape, dtype=dtype, device=place) for _ in "kv") for _ in range(model.layers)]
    limits = StepLimits(
        max_slots=6, max_step_tokens=step_tokens, max_context_tokens=blocks * BLOCK // 6, block_tokens=BLOCK
    )
    runner = build_runner(model, kv, limits, DeviceOptions(graphs=graphs))  # type: ignore[arg-type]
    if graphs:
        runner.capture()
        while place.type == "cuda" and runner.idle():
            pass
    return runner
