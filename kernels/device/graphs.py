"""Whole steps as CUDA graphs, one for each of a few shapes; a step takes the smallest that holds it, padded.

Decode steps are padded with rows of the dummy slot. Short steps with prompts, which the host would launch more slowly
than the card computes them, get such rows behind the decoding ones, and a prompt of the dummy slot behind the prompts.
Elsewhere than on a CUDA device the shapes pad all the same and the step runs as it is: so tests know what padding does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from .wire import Layout

# Rows of decode steps: those captured before an engine is ready, and those between, made when nobody asks. Padding
# costs at most a third of the rows, and a row of the dummy slot reads one position.
_FIRST_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MORE_ROWS = (24, 40, 48, 56, 80, 96, 112, 160, 192, 224, 320, 384, 448, 640, 768, 896)

PROMPT_ROWS = 4  # of a shape with prompts; the last one is the padding's
# Tokens of steps with prompts, and decoding rows among them. One H200, llama-8b: 14 ms to launch a step of any size,
# 11 to compute 512 tokens.
_FIRST_TOKENS = (64, 128, 256, 512)
_MORE_TOKENS = (192, 320, 384, 448)
_BESIDE = (8, 32, 128)


class StepShape(NamedTuple):
    """What a graph was captured for. Of a decode step `prompts` is 0 and `tokens` is `singles`."""

    singles: int  # rows of one token
    prompts: int  # rows behind them
    tokens: int  # over all

    @property
    def rows(self) -> int:
        """Over all."""
        return self.singles + self.prompts

    def holds(self, layout: Layout) -> bool:
        """Whether the step fits, padded."""
        if layout.is_decode or not self.prompts:
            return layout.is_decode and not self.prompts and layout.num_rows <= self.singles
        prompts = layout.num_rows - layout.singles
        rest = self.tokens - self.singles - (layout.num_tokens - layout.singles)
        return not layout.prompts and layout.singles <= self.singles and prompts < self.prompts and rest >= 0


def decode_shape(rows: int) -> StepShape:
    """Rows of one token each."""
    return StepShape(rows, 0, rows)


def shapes_within(max_rows: int, max_tokens: int) -> tuple[list[StepShape], list[StepShape]]:
    """Those worth having before an engine is ready, and those worth having later, small ones first. The largest decode
    shape has `max_rows` rows; padding of the others reaches to position `max_tokens` at most.
    """

    def decode(sizes: Collection[int]) -> list[StepShape]:
        return [decode_shape(rows) for rows in sorted({min(size, max_rows) for size in sizes if size < 2 * max_rows})]

    first = decode((*_FIRST_ROWS, max_rows))
    fitting = [size for size in sorted((*_FIRST_TOKENS, *_MORE_TOKENS)) if size <= max_tokens]
    alone = [StepShape(0, PROMPT_ROWS, tokens) for tokens in fitting]
    beside = [StepShape(rows, PROMPT_ROWS, size) for rows in _BESIDE for size in fitting if 2 * rows <= size]
    later = [shape for shape in decode(_MORE_ROWS) if shape not in first]
    later += [shape for shape in (*alone, *beside) if shape.singles <= max_rows]
    at_first = [shape for shape in alone if shape.tokens in _FIRST_TOKENS]
    return first + at_first, [shape for shape in later if shape not in at_first]


class NotCapturable(RuntimeError):
    """What a graph would be made of cannot be in one; the text says why. Steps can run without."""


class StepGraphs:
    """Graphs over `run(shape)`, which computes a step of that shape in static memory. The step thread's.

    Captures happen on the current stream, which must not be the default one.
    """

    def __init__(self, run: Callable[[StepShape], None], *, device: torch.device) -> None:
        self._run = run
        self._on_card = device.type == "cuda"
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph | None] = {}
        self._broken: list[torch.cuda.CUDAGraph] = []
        self._pool = torch.cuda.graph_pool_handle() if self._on_card else None

    @property
    def shapes(self) -> Collection[StepShape]:
        """Captured ones."""
        return self._graphs.keys()

    def shape_for(self, layout: Layout) -> StepShape | None:
        """The one with the fewest tokens that holds the step; None: it runs without a graph."""
        fitting = [shape for shape in self._graphs if shape.holds(layout)]
        return min(fitting, key=lambda shape: (shape.tokens, shape.singles), default=None)

    def capture(self, shape: StepShape) -> None:
        """Make the graph of one shape, after a run without: what is made at first use must not be made in a graph.
        NotCapturable: that run was fine, but the device was asked, or something that a graph cannot hold was done.
        """
        self._run(shape)
        graph = None
        if self._on_card:
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and copy meanwhile: what they do is not this graph's, and no error either.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._run(shape)
                graph.capture_end()
            except Exception as exc:
                with contextlib.suppress(RuntimeError):  # that the capture is broken is known
                    graph.capture_end()
                # The allocator still thinks that it captures into this pool, and asks the graph whether it does.
                self._broken.append(graph)
                self._pool = torch.cuda.graph_pool_handle()
                torch.cuda.current_stream().synchronize()
                raise NotCapturable(f"{type(exc).__name__}: {exc}") from exc
        self._graphs[shape] = graph

    def replay(self, shape: StepShape) -> None:
        """Compute a step of a captured shape."""
        graph = self._graphs[shape]
        if graph is None:
            self._run(shape)
        else:
            graph.replay()
