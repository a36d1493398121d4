"""One rank's DWDP: what happens at set-up, around each forward, and at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch

from sglang_dwdp.config import MIB, DwdpConfig
from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.layer import ExpertLayer
from sglang_dwdp.experts.share import SharedExperts, SharedLayer, share_experts
from sglang_dwdp.experts.slots import Prefetcher
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.metrics import Counters

logger = logging.getLogger(__name__)


class DwdpRuntime:
    """Shares the experts of a model with the group, and brings each forward the views that it reads.

    `begin_forward … (prime) … wait/release per MoE layer … end_forward` is the life of a forward. A layer that
    runs with no forward announced, as in the capture of a CUDA graph, is bound to its direct view, whose
    address never changes (to its staged tensors where memory cannot be mapped).
    """

    def __init__(self, config: DwdpConfig, memory: Memory, rank: int, size: int) -> None:
        self.config = config
        self.rank = rank
        self.size = size
        self.counters = Counters()
        self._memory = memory
        self._engine = memory.copy_engine(config.timeout_s)
        self._shared: SharedExperts | None = None
        self._prefetcher: Prefetcher | None = None
        self._position: dict[int, int] = {}
        self._uses_direct: list[bool] = []
        self._views = config.views(maps=memory.maps)
        self._rests_direct = memory.maps
        self._direct = self._rests_direct
        self._visited = 0
        self.in_forward = False

    def setup(self, layers: Sequence[ExpertLayer], name: str) -> None:
        """Share the experts; all ranks call this together, with the same `name`, unique on the host.

        Raises:
            DwdpConfigError, DwdpSetupError: see `share_experts`. Nothing is left mapped.
        """
        start = time.perf_counter()
        exchange = Exchange(name, self.rank, self.size, self.config.timeout_s)
        try:
            shared = share_experts(self.config, self._memory, exchange, layers, self._prepare)
        except BaseException:
            self._engine.close()
            raise
        finally:
            exchange.close()
        self._shared = shared
        self._position = {layer.layer.layer_id: i for i, layer in enumerate(shared.layers)}
        self._uses_direct = [self._direct] * len(shared.layers)
        self._log_setup(shared, time.perf_counter() - start)

    def _prepare(self, layers: Sequence[SharedLayer]) -> None:
        if self._views.staged:
            copies, sizes = [layer.copies for layer in layers], [layer.copy_bytes for layer in layers]
            self._prefetcher = Prefetcher(self._engine, copies, sizes, self.config.depth)

    def _log_setup(self, shared: SharedExperts, seconds: float) -> None:
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
            seconds,
            shared.peak_bytes / MIB,
        )

    def begin_forward(self, num_tokens: int) -> None:
        """A forward of `num_tokens` tokens is about to run: choose its views."""
        self._direct = self._views.is_direct(num_tokens)
        self._visited = 0
        self.in_forward = True

    def prime(self) -> None:
        """Before the first layer of a forward that is not a graph replay: fetch what nothing fetched yet."""
        if not self._direct and self._prefetcher is not None:
            self._prefetcher.prime()

    def wait(self, layer_id: int) -> None:
        """The compute stream is about to run this MoE layer: bind its view, wait until it is filled.

        Raises:
            DwdpRuntimeError: copies failed or did not end in time.
        """
        position = self._position[layer_id]
        if self._uses_direct[position] is not self._direct:
            self._rebind(position)
        if not self._direct and self._prefetcher is not None:
            self._prefetcher.wait(position)
        self._visited += 1

    def release(self, layer_id: int) -> None:
        """The compute stream has run this MoE layer: its slot may be filled anew."""
        if not self._direct and self._prefetcher is not None:
            self._prefetcher.release(self._position[layer_id])

    def _rebind(self, position: int) -> None:
        assert self._shared is not None
        shared = self._shared.layers[position]
        shared.layer.use(shared.direct if self._direct else shared.staged)
        self._uses_direct[position] = self._direct

    def end_forward(self, num_tokens: int, *, replayed: bool = False) -> None:
        """The forward that `begin_forward` announced is over.

        replayed: it was the replay of a graph, which calls nothing here.

        Raises:
            DwdpRuntimeError: a forward with tokens ran past this runtime.
        """
        self.in_forward = False
        if not replayed and num_tokens and self._visited != len(self._position):
            raise DwdpRuntimeError(
                f"a forward of {num_tokens} tokens visited {self._visited} of {len(self._position)} MoE layers "
                "through DWDP, so its tokens may be wrong. This model, or another plugin, runs experts by a way "
                "that DWDP does not know: serve without --enable-dwdp, and please report the model."
            )
        self.counters.count_forward(num_tokens, direct=self._direct or replayed)
        self._direct = self._rests_direct

    def count_reads(self, layer_id: int, expert_ids: torch.Tensor) -> None:
        """Count the remote bytes that a direct forward reads; `expert_ids` are those it was routed to.

        Outside of forwards nothing is counted: ids cannot be read while a graph is captured.
        """
        assert self._shared is not None
        if self._direct and self.in_forward:
            remote = self._shared.layers[self._position[layer_id]].remote_bytes
            routed = set(expert_ids.reshape(-1).tolist())
            self.counters.bytes_read_in_place += sum(remote[e] for e in routed if 0 <= e < len(remote))

    def report(self) -> Mapping[str, int | float | str]:
        """Plain numbers and words for /server_info."""
        copied, late = (self._prefetcher.copied_bytes, self._prefetcher.late_fills) if self._prefetcher else (0, 0)
        shared = self._shared
        return {
            "rank": self.rank,
            "group_size": self.size,
            "transport": self._memory.transport,
            "view": self.config.view,
            "direct_max_tokens": self._views.max_tokens,
            "moe_layers": len(self._position),
            "local_experts": shared.local_experts if shared else 0,
            "stored_bytes": shared.stored_bytes if shared else 0,
            "slot_bytes": shared.slot_bytes if shared else 0,
            "setup_peak_bytes": shared.peak_bytes if shared else 0,
            "bytes_copied": copied,
            "late_fills": late,
            "exposed_copy_s": round(self._engine.exposed_s(), 6),
            **self.counters.as_dict(),
        }

    def close(self) -> None:
        """Stop copying and unmap everything. Idempotent."""
        self._engine.close()
        self._prefetcher = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None
