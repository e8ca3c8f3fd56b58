"""Whole decode steps as CUDA graphs, one for each of a few numbers of rows; a step takes the next larger one.

Elsewhere than on a CUDA device the sizes pad all the same and the step runs as it is: so tests know what padding does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

# Captured before an engine is ready, and those between, made when nobody asks. Padding costs at most a third of the
# rows, and rows of the dummy slot read one position.
FIRST_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MORE_SIZES = (24, 40, 48, 56, 80, 96, 112, 160, 192, 224, 320, 384, 448, 640, 768, 896)


def sizes_within(sizes: Sequence[int], max_rows: int) -> list[int]:
    """Those that a step of `max_rows` rows can fill, ascending; the last one holds it."""
    return sorted({min(size, max_rows) for size in sizes if size < 2 * max_rows})


class StepGraphs:
    """Graphs over `run(rows)`, which computes a decode step of that many rows in static memory. The step thread's.

    Captures happen on the current stream, which must not be the default one.
    """

    def __init__(self, run: Callable[[int], None], *, device: torch.device) -> None:
        self._run = run
        self._on_card = device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._sizes: list[int] = []
        self._pool = torch.cuda.graph_pool_handle() if self._on_card else None

    @property
    def sizes(self) -> Sequence[int]:
        """Captured ones, ascending."""
        return self._sizes

    def size_for(self, rows: int) -> int | None:
        """The smallest size that holds so many rows; None: it runs without a graph."""
        at = bisect_left(self._sizes, rows)
        return self._sizes[at] if at < len(self._sizes) else None

    def capture(self, rows: int) -> None:
        """Make the graph of one size, after a run without: what is made at first use must not be made in a graph."""
        self._run(rows)
        graph = None
        if self._on_card:
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and copy meanwhile: what they do is not this graph's, and no error either.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._run(rows)
            finally:
                graph.capture_end()
        self._graphs[rows] = graph
        self._sizes = sorted(self._graphs)

    def replay(self, rows: int) -> None:
        """Compute a step of a captured size."""
        graph = self._graphs[rows]
        if graph is None:
            self._run(rows)
        else:
            graph.replay()
