"""One small forward on each rank before a server says that it is ready.

SGLang's warm-up request reaches one rank, and none with --skip-server-warmup, so a model whose forward cannot run would
be found out by the first user of another rank.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpError, DwdpSetupError
from sglang_dwdp.srt_patches.exchange import current_steps
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.lost_rank import end_stalled

_TOKENS = 4


def run_first_forward(_result: None, runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `ModelRunner.init_cuda_graphs`: a prefill as of a request, which is not counted.

    Raises:
        DwdpError: The forward failed, called a collective, or went past the runtime.
    """
    if runner.is_draft_worker:
        return
    try:
        with torch.no_grad():
            runner.forward(_batch(runner))
        if (steps := current_steps()) is not None:
            steps.wait()  # no scheduler asks for this result, and it would wait for the one before each time
    except DwdpError:
        raise
    except Exception as error:
        raise DwdpSetupError(
            f"a forward of {_TOKENS} tokens failed before the server was ready: {error!r}. "
            f"{type(runner.model).__name__} may be unsupported (the traceback says where it failed). If it serves "
            "without --enable-dwdp, please report it."
        ) from error
    current_runtime().reset_counts()


def watch_copies(info: dict[str, Any], _scheduler: Any) -> dict[str, Any]:
    """After `Scheduler.get_init_info`: all graphs, a draft model's too, are captured."""
    current_runtime().watch_copies(end_stalled)
    return info


def _batch(runner: Any) -> ForwardBatch:
    """A prompt of `_TOKENS` tokens. Its KV goes to slot 0 of row 0, which SGLang keeps for padding."""
    count, device = _TOKENS, runner.device
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    length = torch.full((1,), count, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=zeros,
        req_pool_indices=zeros[:1].clone(),
        seq_lens=length,
        orig_seq_lens=length.int(),
        seq_lens_cpu=length.cpu(),
        seq_lens_sum=count,
        out_cache_loc=zeros.clone(),
        positions=torch.arange(count, device=device),
        mrope_positions=zeros.repeat(3, 1),
        extend_num_tokens=count,
        extend_seq_lens=length.int(),
        extend_prefix_lens=zeros[:1].int(),
        extend_start_loc=zeros[:1].int(),
        extend_seq_lens_cpu=[count],
        extend_prefix_lens_cpu=[0],
        spec_algorithm=runner.spec_algorithm,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )
    runner.kv_index_translator.bind_runner_slots(batch)
    return batch


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs", HookType.AFTER, run_first_forward),
    Hook("sglang.srt.managers.scheduler.Scheduler.get_init_info", HookType.AFTER, watch_copies),
)
