"""Memory that was handed out is not freed while peers may copy from it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("cuda.bindings")

from sglang_dwdp.memory import cuda_ipc
from sglang_dwdp.memory.cuda_ipc import IpcBlock


@pytest.mark.parametrize(
    ("own", "exported", "called"),
    [(True, False, "cuMemFree"), (True, True, None), (False, False, "cuIpcCloseMemHandle")],
)
def test_what_closing_a_block_does(
    own: bool, exported: bool, called: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cuda_ipc, "call", lambda function, *_: calls.append(getattr(function, "__name__", "")))
    monkeypatch.setattr(cuda_ipc.torch.cuda, "synchronize", lambda _device: None)
    block: Any = IpcBlock(4096, 16, 0, own=own)
    block.is_exported = exported
    block.close()
    block.close()
    assert calls == ([] if called is None else [called])
    with pytest.raises(ValueError, match="closed"):
        _ = block.address
