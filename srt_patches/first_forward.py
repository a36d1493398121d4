"""One small forward on each rank before a server says that it is ready.

SGLang's warm-up request reaches one rank, and none with --skip-server-warmup, so a model whose forward cannot run would
be found out by the first user of another rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpError, DwdpSetupError
from sglang_dwdp.metrics import Counters
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook

_TOKENS = 4


def run_first_forward(_result: None, runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `ModelRunner.init_cuda_graphs`: prefill a few tokens, whose KV goes to the slot that SGLang pads with.

    Raises:
        DwdpError: The forward failed, called a collective, or went past the runtime.
    """
    if runner.is_draft_worker:
        return
    eager = runner.eager_runner
    try:
        with torch.no_grad():
            eager._dummy_run(
                batch_size=1,
                run_ctx=_announced(current_runtime()),
                forward_mode_override=ForwardMode.EXTEND,
                buffers=eager._alloc_dummy_decode_buffers(1, num_tokens_per_req=_TOKENS),
                extend_num_tokens_per_req=_TOKENS,
            )
    except DwdpError:
        raise
    except Exception as error:
        raise DwdpSetupError(
            f"a forward of {_TOKENS} tokens failed before the server was ready: {type(error).__name__}: {error}. "
            f"{type(runner.model).__name__} may be unsupported (the traceback says where it failed). If it serves "
            "without --enable-dwdp, please report it."
        ) from error


@contextmanager
def _announced(runtime: DwdpRuntime) -> Iterator[None]:
    """A forward that goes to the model without `ModelRunner.forward`, and is not counted."""
    runtime.begin_forward(_TOKENS)
    try:
        runtime.prime()
        yield
    except BaseException:
        runtime.abort_forward()
        raise
    runtime.end_forward(_TOKENS)
    runtime.counters = Counters()


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs", HookType.AFTER, run_first_forward),
)
