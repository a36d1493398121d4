"""The staged layers of forwards: waited for and released as they run or, in CUDA graphs, around each captured piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.slots import Prefetcher


class Graph(Protocol):
    """A captured CUDA graph."""

    def replay(self) -> object:
        """Launch it on the current stream."""


@dataclass(slots=True)
class StagedLayers:
    """Orders copies and what reads them. Layers that run within `capture` are noted for the piece that they are in.

    Attributes:
        prefetcher: Fills the layers' slots.
        depth: The number of slots.
        visit: Called at a replay with the position of each layer that it runs.
        is_replay: The current forward has replayed a piece with staged layers.
        between_segments: What else to do while a staged forward is launched.
    """

    prefetcher: Prefetcher
    depth: int
    visit: Callable[[int], None]
    is_replay: bool = False
    between_segments: Callable[[], None] = lambda: None
    _is_capturing: Callable[[], bool] | None = None
    _captured: list[int] = field(default_factory=list)

    def wait(self, position: int) -> None:
        """As `Prefetcher.wait`; a layer that is being captured is waited for when its piece is replayed."""
        if self._is_capturing is not None and self._is_capturing():
            self._captured.append(position)
        else:
            self.prefetcher.wait(position)

    def release(self, position: int) -> None:
        """As `Prefetcher.release`, likewise."""
        if not self._captured:
            self.prefetcher.release(position)

    @contextmanager
    def capture(self, is_capturing: Callable[[], bool]) -> Iterator[None]:
        """Note the layers that run while `is_capturing` says so."""
        self._is_capturing = is_capturing
        try:
            yield
        finally:
            self._captured.clear()
            self._is_capturing = None

    def segment(self, graph: Graph) -> Graph:
        """The piece that was just captured, with the waits and releases of the staged layers in it.

        Returns:
            `graph` itself where it reads no staged experts, as decode graphs and pieces without MoE layers.

        Raises:
            DwdpRuntimeError: the piece has more MoE layers than there are slots.
        """
        positions, self._captured = self._captured, []
        if not positions:
            return graph
        if len(positions) > self.depth:
            raise DwdpRuntimeError(
                f"a piece of the prefill graph has {len(positions)} MoE layers, and there are {self.depth} "
                f"slots for their experts. Set --dwdp-depth {len(positions)} or --disable-prefill-cuda-graph."
            )
        return GraphSegment(self, graph, positions)


@dataclass(frozen=True, slots=True, eq=False)
class GraphSegment:
    """A captured piece of a forward that reads staged experts, replayed between their wait and their release.

    The kernels in `graph` read the slots at the addresses that they were captured with, which never change; when the
    slots are filled is decided at every replay anew.
    """

    layers: StagedLayers
    graph: Graph
    positions: list[int]

    def replay(self) -> None:
        """Launch the graph on the current stream, in the order with copies that its experts need."""
        layers, prefetcher = self.layers, self.layers.prefetcher
        if not layers.is_replay:
            layers.is_replay = True
            prefetcher.prime()
        for position in self.positions:
            prefetcher.wait(position)
            layers.visit(position)
        self.graph.replay()
        for position in self.positions:
            prefetcher.release(position)
        layers.between_segments()
