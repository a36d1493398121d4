"""One rank's DWDP: what happens at set-up, around each forward, and at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from sglang_dwdp import nvtx
from sglang_dwdp.config import MIB, DwdpConfig
from sglang_dwdp.counters import ForwardCounts
from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.layer import ExpertLayer
from sglang_dwdp.experts.share import SharedExperts, SharedLayer, share_experts
from sglang_dwdp.experts.slots import Prefetcher
from sglang_dwdp.experts.stalls import LIMIT_S, CopyWatch
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.places import Place
from sglang_dwdp.served_weights import ServedWeights
from sglang_dwdp.staged_layers import StagedLayers

logger = logging.getLogger(__name__)


class DwdpRuntime:
    """Shares the experts of a model with the group, and brings each forward the views that it reads.

    `begin_forward … (prime) … wait/release per MoE layer … end_forward` is the life of a forward. A layer that
    runs with no forward announced, as in the capture of a decode graph, is bound to its direct view, whose
    address never changes (to its staged tensors where memory cannot be mapped).

    The last of the layers may be a draft model's, which runs in forwards of its own between the model's.

    A forward that is captured piecewise runs within `capture`, and `staged` wraps each captured piece.
    """

    def __init__(self, config: DwdpConfig, memory: Memory, rank: int, size: int) -> None:
        self.config = config
        self.rank = rank
        self.size = size
        self._counts = ForwardCounts()
        self._exposed_before_s = 0.0
        self._memory = memory
        self._copy_limit_s = min(config.timeout_s, LIMIT_S)
        self._engine = memory.copy_engine(self._copy_limit_s)
        self._shared = SharedExperts()
        self._position: dict[int, int] = {}
        self._uses_direct: list[bool] = []
        self._views = config.views(maps=memory.maps)
        self._direct = memory.maps
        self._visited: set[int] = set()  # in this forward, by position
        unused = Prefetcher(self._engine, (), (), config.depth)  # until set-up, and where no forward is staged
        self.staged = StagedLayers(unused, config.depth, self._visited.add)
        self._draft_layers = 0
        self._in_draft = False
        self._reports: list[Callable[[], Mapping[str, int | float | str]]] = []
        self._closers: list[Callable[[], None]] = []
        self._setup_s = 0.0
        self.in_forward = False
        self.weights = ServedWeights(memory, self._shared, rank, size, self.staged.prefetcher.forget)
        self.in_exchange_step = False  # said by what runs them, before the forward begins

    def setup(
        self, layers: Sequence[ExpertLayer], name: str, place: Place | None = None, *, draft_layers: int = 0
    ) -> None:
        """Share the experts; all ranks call this together, with the same `name`, a secret of the group.

        Args:
            layers: The MoE layers, in the order in which the model runs them, and then those of its draft model.
            name: Unique on the host.
            place: Where the ranks meet; None: within the host.
            draft_layers: How many of them are the draft model's.

        Raises:
            DwdpConfigError: See `share_experts`. Nothing is left mapped.
            DwdpSetupError: The same.
        """
        start = time.perf_counter()
        exchange = Exchange(name, self.rank, self.size, self.config.timeout_s, place)
        try:
            shared = share_experts(self.config, self._memory, exchange, layers, self._prepare)
        except BaseException:
            self._engine.close()
            raise
        finally:
            exchange.close()
        self._shared = shared
        self.weights = ServedWeights(self._memory, shared, self.rank, self.size, self.staged.prefetcher.forget)
        self._position = {layer.layer.layer_id: i for i, layer in enumerate(shared.layers)}
        self._uses_direct = [self._direct] * len(shared.layers)
        self._draft_layers = draft_layers
        self._setup_s = time.perf_counter() - start
        self._log_setup(shared)

    def _prepare(self, layers: Sequence[SharedLayer]) -> None:
        if self._views.staged:
            copies, sizes = [layer.copies for layer in layers], [layer.copy_bytes for layer in layers]
            fills = [layer.describe_copies() for layer in layers]
            prefetcher = Prefetcher(self._engine, copies, sizes, self.config.depth, fills.__getitem__)
            self.staged.prefetcher = prefetcher
            nvtx.annotate(prefetcher, [layer.layer.layer_id for layer in layers])

    def _log_setup(self, shared: SharedExperts) -> None:
        remote = [sum(layer.remote_bytes) for layer in shared.layers]
        logger.info(
            "DWDP is set up: rank %d of %d, %d MoE layers, %.1f MiB of experts stored (%d experts a layer), "
            "%.1f MiB remote a layer, %.1f MiB replicated, %.1f MiB in slots (depth %d), transport %s, views %s, "
            "%.2f s, at most %.1f MiB held for experts meanwhile",
            self.rank,
            self.size,
            len(shared.layers),
            shared.stored_bytes / MIB,
            shared.local_experts,
            max(remote) / MIB,
            shared.replicated_bytes / MIB,
            shared.slot_bytes / MIB,
            self.config.depth,
            self._memory.transport,
            self.config.view if self._memory.maps else "staged",
            self._setup_s,
            shared.peak_bytes / MIB,
        )

    def watch_copies(self, on_stall: Callable[[Sequence[str]], None]) -> None:
        """Call `on_stall` with a description of copies that do not end; from when the last graph was captured."""
        if self._views.staged:
            watch = CopyWatch(self.staged.prefetcher, self._copy_limit_s, on_stall)
            watch.start()
            self._closers.append(watch.close)

    def begin_forward(self, num_tokens: int, *, draft: bool = False) -> None:
        """A forward of `num_tokens` tokens is about to run: choose its views.

        Args:
            num_tokens: Of all sequences, drafted ones included.
            draft: It is the draft model's.

        Raises:
            DwdpRuntimeError: the experts' memory was released.
        """
        self.weights.check_not_released()
        self._direct = self.in_exchange_step or self._views.is_direct(num_tokens)
        self._visited.clear()
        self.staged.is_replay = False
        self._in_draft = draft
        self.in_forward = True

    def prime(self) -> None:
        """Before the first layer of a forward that is not a graph replay: fetch what nothing fetched yet."""
        if not self._direct:
            self.staged.prefetcher.prime()

    def wait(self, layer_id: int) -> None:
        """The compute stream is about to run this MoE layer: bind its view, wait until it is filled.

        Raises:
            DwdpRuntimeError: copies failed or did not end in time.
        """
        position = self._position[layer_id]
        if self._uses_direct[position] is not self._direct:
            self._rebind(position)
        if not self._direct:
            self.staged.wait(position)
        self._visited.add(position)

    def release(self, layer_id: int) -> None:
        """The compute stream has run this MoE layer: its slot may be filled anew."""
        if not self._direct:
            self.staged.release(self._position[layer_id])

    def copy_bytes(self) -> int:
        """What a staged forward copies, in bytes."""
        return sum(shared.copy_bytes for shared in self._shared.layers)

    def add_part(self, report: Callable[[], Mapping[str, int | float | str]], close: Callable[[], None]) -> None:
        """Let something that builds on the shared experts report with this runtime, and end before it."""
        self._reports.append(report)
        self._closers.append(close)

    def visit(self, layer_id: int) -> None:
        """This MoE layer runs in a way of its own, as in an exchange step."""
        self._visited.add(self._position[layer_id])

    @contextmanager
    def capture(self, num_tokens: int, is_capturing: Callable[[], bool]) -> Iterator[None]:
        """Warm-ups and the capture of a prefill of `num_tokens` tokens, in pieces that `staged.segment` takes.

        Args:
            num_tokens: the size that the graph will be replayed with, padding included: it decides the views.
            is_capturing: whether the current stream is being captured. Warm-ups, and what runs between two pieces,
                are not.
        """
        self.begin_forward(num_tokens)
        self.in_forward = False  # SGLang's barriers around a capture are no part of a forward
        self.prime()
        try:
            with self.staged.capture(is_capturing):
                yield
        finally:
            self.abort_forward()

    def _rebind(self, position: int) -> None:
        shared = self._shared.layers[position]
        shared.layer.use(shared.direct if self._direct else shared.staged)
        self._uses_direct[position] = self._direct

    def end_forward(self, num_tokens: int, *, replayed: bool = False) -> None:
        """The forward that `begin_forward` announced is over.

        Args:
            num_tokens: of the batch, without padding.
            replayed: it was the replay of a graph. Of those only the pieces of a staged prefill call back.

        Raises:
            DwdpRuntimeError: a forward with tokens ran past this runtime.
        """
        self.in_forward = False
        calls_back = self.staged.is_replay or not replayed
        expected = self._draft_layers if self._in_draft else len(self._position) - self._draft_layers
        if calls_back and num_tokens and len(self._visited) != expected:
            raise DwdpRuntimeError(
                f"a forward of {num_tokens} tokens visited {len(self._visited)} of {expected} MoE layers "
                "through DWDP, so its tokens may be wrong. This model, or another plugin, runs experts by a way "
                "that DWDP does not know: serve without --enable-dwdp, and please report the model."
            )
        if not self._in_draft:
            self._count(num_tokens, replayed)
        self._direct = self._memory.maps

    def _count(self, num_tokens: int, replayed: bool) -> None:
        if self.in_exchange_step:
            self._counts.joint_forwards += 1
            self._counts.exchanged_rows += num_tokens
        elif self.staged.is_replay or not (self._direct or replayed):
            self._counts.staged_forwards += 1
        else:
            self._counts.direct_forwards += 1
        self._counts.forward_tokens += num_tokens

    def abort_forward(self) -> None:
        """The forward that `begin_forward` announced did not end, or was a capture's: nothing is counted."""
        self.in_forward = False
        self._direct = self._memory.maps

    def count_reads(self, layer_id: int, expert_ids: torch.Tensor) -> None:
        """Count the remote bytes that a direct forward reads; `expert_ids` are those it was routed to.

        Outside of forwards nothing is counted: ids cannot be read while a graph is captured.
        """
        if self._direct and self.in_forward:
            remote = self._shared.layers[self._position[layer_id]].remote_bytes
            routed = set(expert_ids.reshape(-1).tolist())
            self._counts.bytes_read_in_place += sum(remote[e] for e in routed if 0 <= e < len(remote))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Between forwards: every layer is bound to tensors that hold all of its experts.

        Raises:
            DwdpRuntimeError: the experts' memory was released, or cannot be mapped, so that there are none.
        """
        self.weights.check_not_released()
        if not self._memory.maps:
            raise DwdpRuntimeError(f"with {self._memory.transport} no rank has tensors of all experts.")
        self._direct = True
        for position in range(len(self._shared.layers)):
            self._rebind(position)
        yield

    def reset_counts(self) -> None:
        """Forget the forwards and waits so far: they were no request's."""
        self._counts, self._exposed_before_s = ForwardCounts(), self._engine.exposed_s()

    def report(self) -> Mapping[str, int | float | str]:
        """Plain numbers and words for /server_info."""
        return {
            "rank": self.rank,
            "group_size": self.size,
            "transport": self._memory.transport,
            "view": self.config.view,
            "direct_max_tokens": self._views.max_tokens,
            "moe_layers": len(self._position),
            "local_experts": self._shared.local_experts,
            "stored_bytes": self._shared.stored_bytes,
            "slot_bytes": self._shared.slot_bytes,
            "setup_peak_bytes": self._shared.peak_bytes,
            "setup_s": round(self._setup_s, 3),
            "bytes_copied": self.staged.prefetcher.copied_bytes,
            "late_fills": self.staged.prefetcher.late_fills,
            "exposed_copy_s": round(self._engine.exposed_s() - self._exposed_before_s, 6),
            **dataclasses.asdict(self._counts),
            **{name: value for report in self._reports for name, value in report().items()},
        }

    def take_waits(self) -> list[float]:
        """Seconds of single waits for copies since the last call, as `CopyEngine.take_waits`."""
        return self._engine.take_waits()

    def close(self) -> None:
        """Stop copying and unmap everything. Idempotent."""
        with ExitStack() as closing:  # goes on after one that fails; the last one is called first
            closing.callback(self._shared.close)
            closing.callback(self.staged.prefetcher.close)
            closing.callback(self._engine.close)
            while self._closers:
                closing.callback(self._closers.pop(0))
