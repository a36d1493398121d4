"""Slots over steps: which layer's experts lie in which slot, and when the next ones are fetched.

```
compute  ──attn l──▶ wait filled ▶ MoE l ▶ record released ──attn l+1──▶ …
copy              ◀─ wait released ─ copy the next layer that uses this slot ─ record filled ─▶
```

Invariants:
- Layer l (by position) always uses slot `slot_of(l, depth)`, so its staged view never changes.
- A slot is overwritten only after the compute stream has passed the layer that read it.
- The cycle of layers that share a slot does not end with a forward: the last of them hands the slot to the
  first one of the next step, so a step does not start cold.
- A slot remembers what it holds; a fetch of that is skipped. With `depth` ≥ the number of layers, every
  layer is fetched once and stays.
- The host allocates nothing here and waits only where the engine's `wait` is a host wait (the CPU's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.layout import slot_of
from sglang_dwdp.memory.base import CopyEngine, CopyList, Event


@dataclass(slots=True)
class _Slot:
    filled: Event
    released: Event
    holds: int = -1


class Prefetcher:
    """Fills the slots of a ring of staged layers.

    Args:
        engine: what copies.
        plans: `[num_layers]`, what a fill of each layer copies.
        plan_bytes: `[num_layers]`, its size.
        depth: slots.
        describe: what a fill of a layer is, for messages.
    """

    def __init__(
        self,
        engine: CopyEngine,
        plans: Sequence[CopyList],
        plan_bytes: Sequence[int],
        depth: int,
        describe: Callable[[int], str] = "layer at position {}".format,
    ) -> None:
        self._engine = engine
        self._plans = [engine.prepare(plan) for plan in plans]
        self._plan_bytes, self._describe = plan_bytes, describe
        self._slots = [_Slot(engine.event(), engine.event()) for _ in range(min(depth, len(plans)))]
        self._next = [(i + depth) if i + depth < len(plans) else slot_of(i, depth) for i in range(len(plans))]
        self.copied_bytes = 0
        self.late_fills = 0

    @property
    def depth(self) -> int:
        """Slots in use; 0 where nothing is copied."""
        return len(self._slots)

    def prime(self) -> None:
        """Fetch the first layer of every slot that holds nothing yet, as in the first step."""
        for index, slot in enumerate(self._slots):
            if slot.holds < 0:
                self._fill(slot, index)

    def wait(self, layer: int) -> None:
        """Hold the compute stream until the slot of `layer` holds its experts.

        A layer that was not fetched ahead (a step was cut short, or layers were visited out of order) is
        fetched now.

        Raises:
            DwdpRuntimeError: copies failed or did not end in time.
        """
        slot = self._slots[slot_of(layer, len(self._slots))]
        if slot.holds != layer:
            self.late_fills += 1
            if slot.holds >= 0:
                # A fill that nobody waited for may still be under way, on streams that this one does not wait for.
                self._wait(slot)
            # Whatever the compute stream has read from this slot lies before this point.
            self._engine.record(slot.released)
            self._fill(slot, layer)
        self._wait(slot)

    def unfinished(self) -> list[str]:
        """The fills that are under way, described. May be called by another thread than the forward's."""
        return [
            self._describe(layer)
            for slot in self._slots
            if (layer := slot.holds) >= 0 and not self._engine.is_done(slot.filled)
        ]

    def release(self, layer: int) -> None:
        """Note that the compute stream has read the slot of `layer`, and fetch what uses it next."""
        slot = self._slots[slot_of(layer, len(self._slots))]
        following = self._next[layer]
        if slot.holds != following:
            self._engine.record(slot.released)
            self._fill(slot, following)

    def copy_all(self) -> None:
        """Between forwards: what a staged forward copies, with nothing that computes meanwhile.

        Raises:
            DwdpRuntimeError: copies failed or did not end in time.
        """
        self.prime()
        for layer in range(len(self._next)):
            self.wait(layer)
            self.release(layer)

    def _wait(self, slot: _Slot) -> None:
        try:
            self._engine.wait(slot.filled)
        except DwdpRuntimeError as error:
            raise DwdpRuntimeError(f"{self._describe(slot.holds)}: {error}") from error

    def forget(self) -> None:
        """Wait for what is being fetched, and hold nothing: what was fetched is about to change.

        Between forwards only.

        Raises:
            DwdpRuntimeError: copies failed or did not end in time.
        """
        for slot in self._slots:
            if slot.holds >= 0:
                self._wait(slot)
            slot.holds = -1

    def close(self) -> None:
        """Drop the plans, whose memory is about to be unmapped. Nothing can be waited for afterwards."""
        self._plans, self._slots = [], []

    def _fill(self, slot: _Slot, layer: int) -> None:
        slot.holds = -1  # nothing that can be used, should the engine raise
        self._engine.fill(self._plans[layer], slot.released, slot.filled)
        slot.holds = layer
        self.copied_bytes += self._plan_bytes[layer]
