"""A kernel's results on views, beside those on resident experts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.moe_problems import Case, Experts
from tests.fixtures.ranks import PlainLayer, visit

# Kernels keep settings for a process (FlashInfer's runner the sizes of its last call), and ranks, elsewhere processes,
# are threads here.
_ONE_AT_A_TIME = threading.Lock()


def differences(
    runtime: DwdpRuntime,
    layers: Sequence[PlainLayer],
    cases: Sequence[Case],
    expected: Sequence[Sequence[torch.Tensor]],
    run: Callable[[Case, Experts], torch.Tensor],
) -> list[int]:
    """The sizes in tokens of the forwards in which a layer's result is not bitwise the expected one, of two each."""
    different = []
    for case, row in zip(cases, expected, strict=True):

        def look(layer: PlainLayer, case: Case = case) -> torch.Tensor:
            with _ONE_AT_A_TIME:
                return run(case, layer.tensors)

        for _ in range(2):
            results = visit(runtime, layers, len(case.x), look)
            pairs = zip(results, row, strict=True)
            different += [len(case.x) for result, wanted in pairs if not torch.equal(result, wanted)]
    return different
